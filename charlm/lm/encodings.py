"""What bytes that are no UTF-8 text look like, and the command that converts them."""

from __future__ import annotations

import codecs
import shlex

MARKS = {  # byte order marks; those of UTF-32 begin as those of UTF-16 do
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
HEAD = 4096  # bytes that are looked at
MOST = 0.7  # share of NULs at every second place from which on a text is UTF-16 without a mark


def wide_encoding(raw: bytes) -> str | None:
    """The name of the encoding of two or four bytes a character that `raw` seems to be in; None if it is in none.

    UTF-16 of ASCII letters without a byte order mark is valid UTF-8, with a NUL at every second place.
    """
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            return name
    head = raw[: min(len(raw), HEAD) // 2 * 2]
    if len(head) < 4:
        return None
    even, odd = (head[start::2].count(0) / (len(head) // 2) for start in (0, 1))
    if odd >= MOST and even < 1 - MOST:
        return "UTF-16LE"
    return "UTF-16BE" if even >= MOST and odd < 1 - MOST else None


def advice(raw: bytes, at: int, name: str) -> str:
    """What to do about `raw`, whose byte `at` is no UTF-8: the end of a sentence, or "" where nothing can be said."""
    encoding = wide_encoding(raw)
    if encoding is None and 0 in raw[:HEAD]:
        return "; it looks like a binary file, no text"
    if encoding is None and _is_cut_off(raw[at:]):
        return "; it seems to be cut off inside a character"
    looks = f"it looks like {encoding}"
    if encoding is None:
        encoding, looks = "WINDOWS-1252", "it may be ISO-8859-1 or Windows-1252"
    return f"; {looks}: {conversion(encoding, name)}"


def _is_cut_off(end: bytes) -> bool:
    """Whether `end` is the beginning of a character of UTF-8, and no more."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(end) == ""
    except UnicodeDecodeError:
        return False


def conversion(encoding: str, name: str) -> str:
    """The command that makes UTF-8 of the file called `name`."""
    source = "" if name == "standard input" else f" {shlex.quote(name)}"
    return f"`iconv -f {encoding} -t UTF-8{source} > utf8.txt` converts it"
