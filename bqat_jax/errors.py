"""The one kind of error whose message is written for the person at the command line."""


class UserError(ValueError):
    """Something the user can mend. The message names the value, the cause and the remedy; no traceback is needed."""
