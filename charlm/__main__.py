"""The command `charlm`, which `python -m charlm` is too."""

from __future__ import annotations

import sys

from charlm._extras import MissingExtraError


def main() -> None:
    """Runs the command line; without the extra `lm`, one sentence on stderr and exit code 2."""
    try:
        from charlm import cli
    except MissingExtraError as error:
        print(f"charlm: {error}", file=sys.stderr)
        sys.exit(2)
    cli.main()


if __name__ == "__main__":
    main()
