"""The error of a user's mistake; commands show its message alone and exit with status 2."""


class UserError(ValueError):
    """A setting, path or file that cannot be used.

    The message says what was given, what is allowed and which key to change.
    """
