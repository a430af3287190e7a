"""Reads the libraries and symbols that a Linux shared object needs, without binutils. Used by setup.py."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SECTION_TYPES = {6: "dynamic", 11: "symbols"}  # SHT_DYNAMIC, SHT_DYNSYM
NEEDED = 1  # DT_NEEDED
UNDEFINED = 0  # SHN_UNDEF


class DynamicSection(NamedTuple):
    """The libraries that a shared object needs, and its undefined and defined symbols."""

    needed: set[str]
    undefined: set[str]
    defined: set[str]


def read_dynamic_section(path: Path) -> DynamicSection:
    """The dynamic section of a 64-bit ELF file; ValueError for any other file."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise ValueError(f"{path} is not a 64-bit ELF file")
    order = "<" if data[5] == 1 else ">"

    def records(layout: str, offset: int, size: int) -> Iterator[tuple[int, ...]]:
        return struct.iter_unpack(order + layout, data[offset : offset + size])

    (table,) = struct.unpack_from(order + "Q", data, 0x28)
    entry_size, n_entries = struct.unpack_from(order + "HH", data, 0x3A)
    # A section: name, type, flags, address, offset, size, link, info, alignment, size of an entry.
    sections = list(records("IIQQQQIIQQ", table, entry_size * n_entries))
    found = {SECTION_TYPES[section[1]]: section for section in sections if section[1] in SECTION_TYPES}

    def rows(name: str, layout: str) -> Iterator[tuple[int, ...]]:
        return records(layout, *found[name][4:6]) if name in found else iter(())

    def string(name: str, at: int) -> str:
        start = sections[found[name][6]][4] + at
        return data[start : data.index(b"\0", start)].decode()

    needed = {string("dynamic", value) for tag, value in rows("dynamic", "qQ") if tag == NEEDED}
    # A symbol: name, type and binding, visibility, section, value, size.
    symbols = [(string("symbols", row[0]), row[3] == UNDEFINED) for row in rows("symbols", "IBBHQQ")]
    undefined = {name for name, is_undefined in symbols if is_undefined}
    return DynamicSection(needed, undefined, {name for name, _ in symbols} - undefined)
