"""What a user can put right: told in one line, without a traceback."""


class UsageError(Exception):
    """The command cannot do what it was asked; the message says why and what would do."""
