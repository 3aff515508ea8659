"""Errors of a run that are not bugs."""


class ConfigError(ValueError):
    """A setting that can't be used: one line that names the file or option, the field, and the fix."""


class LostProcessError(RuntimeError):
    """Another process of the same run died, or has stopped responding."""
