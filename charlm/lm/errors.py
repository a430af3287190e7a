"""The one exception that the command line turns into a sentence on stderr."""


class UserError(Exception):
    """Something the user can put right: a file, a flag or a checkpoint; the text is one sentence."""
