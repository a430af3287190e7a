"""The one exception that the command line turns into a sentence on stderr."""

from charlm._errors import UserError

__all__ = ["UserError"]
