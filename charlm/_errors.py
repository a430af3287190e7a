"""The error of the language model and its command line; here, where `import charlm` finds it without them."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right: a file, an option or a checkpoint. The message is one sentence."""


UserError.__module__ = "charlm"  # where it is exported, and so what a traceback and a pickle name
