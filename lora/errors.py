"""The error of this package."""


class LoRAError(ValueError):
    """A setting or adapter file that can't be used: one line that names the field or file, and the fix."""
