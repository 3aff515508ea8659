"""The error that bad data raises."""


class DataError(ValueError):
    """Data that can't be used: one line that names the file, the row or field, and the fix."""
