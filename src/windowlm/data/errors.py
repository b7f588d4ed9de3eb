"""The error for data that cannot be used."""

from windowlm.errors import UserError


class DataError(UserError):
    """The data are missing, empty, unreadable or too small; the message names the setting to change."""
