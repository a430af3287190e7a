"""An extension of griffe for the reference site: our docstrings in the words of its parser of Google's style."""

from __future__ import annotations

import re
from typing import Any

import griffe

WRAPPED = re.compile(r"^( +(?:\w+, )*\w+,)\n +(?=(?:\w+, )*\w+: )", re.MULTILINE)  # a list of names over two lines
SHAPES = re.compile(r"^( *)Shape:\n((?:\1 +\S.*\n?)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = obj.docstring.value
            while text != (text := WRAPPED.sub(r"\1 ", text)):
                pass
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # Markdown needs no mark of a block that is indented
            text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = SHAPES.sub(_as_list, text)


def _as_list(section: re.Match[str]) -> str:
    indent = f"{section[1]}    "
    return f"{section[1]}Shape:\n" + re.sub(rf"^{indent}(?=\S)", f"{indent}- ", section[2], flags=re.MULTILINE)
