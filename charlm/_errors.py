"""The error of the language model and its command line, defined where `import charlm` finds it without them."""

from __future__ import annotations


class UserError(ValueError):
    """An error that the user can fix: a file, an option or a checkpoint. The message is one sentence."""


UserError.__module__ = "charlm"  # where it is exported; tracebacks and pickles show this name
