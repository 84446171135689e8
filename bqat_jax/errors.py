"""The exception for errors that the user can fix."""


class UserError(ValueError):
    """An error that the user can fix: the message names the value, the cause and the remedy."""
