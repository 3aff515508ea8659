"""The errors of a run that are no bugs."""


class ConfigError(ValueError):
    """A setting that can't be used: one line that names the file or option, the field, and the mend."""


class LostProcessError(RuntimeError):
    """Another process of the same run died, or is silent for too long."""
