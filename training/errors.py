"""The error that a run's settings raise."""


class ConfigError(ValueError):
    """A setting that can't be used: one line that names the file or option, the field, and the mend."""
