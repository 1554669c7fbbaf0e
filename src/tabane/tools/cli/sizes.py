"""Sizes as free, df and vmstat write them."""

from __future__ import annotations

import re

from tabane.errors import UsageError

LETTERS = "KMGTPEZY"
IEC, SI = 1024, 1000


def scaled(size_bytes: int, *, base: int = IEC) -> str:
    """As `free -h`: in the smallest unit in which it has few digits, rounded down but for one
    decimal: `0B`, `465Mi`, `1.0Gi`; of SI `548M`."""
    mark, cells = ("i", 5) if base == IEC else ("", 4)
    if len(text := f"{size_bytes}B") <= 4:
        return text
    value = float(size_bytes)
    for letter in LETTERS:
        value /= base
        for text in (f"{value:.1f}{letter}{mark}", f"{int(value)}{letter}{mark}"):
            if len(text) <= cells:
                return text
    return text


def rounded_up(size_bytes: int, *, base: int = IEC) -> str:
    """As `df -h`: at least as much as it is, with one decimal below ten: `0`, `9.8G`, `12G`. In
    whole numbers, since a float would turn 1.1 into a bit more, and that into 1.2."""
    unit = 1
    for letter in ("", *(LETTERS if base == IEC else LETTERS.replace("K", "k"))):
        tenths = -(-size_bytes * 10 // unit)
        if letter and tenths < 100:
            return f"{tenths // 10}.{tenths % 10}{letter}"
        whole = -(-size_bytes // unit)
        if whole < base:
            return f"{whole}{letter}"
        unit *= base
    return f"{whole}{letter}"


def parse_unit(text: str) -> int:
    """`1`, `K`, `4K`, `MB`, `MiB`: in bytes. Raises `UsageError`."""
    found = re.fullmatch(rf"([0-9]{{0,9}})([{LETTERS}k]?)(i?B)?", text)
    if (
        not found
        or not text
        or (found[3] and not found[2])
        or found[1].strip("0") == "" != found[1]
    ):
        raise UsageError(f"{text!r} is no unit: write K, M, G, 4K, MB, ...")
    base = SI if found[3] == "B" else IEC
    power = (LETTERS.index(found[2].upper()) + 1) if found[2] else 0
    unit: int = base**power
    return int(found[1] or 1) * unit
