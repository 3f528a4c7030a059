"""The one exception whose message is for the user: what was wrong, what is allowed, what to do."""


class UserError(Exception):
    """A wrong argument, file or environment; the command line prints it without a traceback."""
