"""What programs and servers say of themselves, as facts. Without IO; all of it may be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import msgspec

from tabane.errors import ProtocolError
from tabane.k2i.collectors.api import (
    MAX_FACTS,
    MAX_NAME_BYTES,
    MAX_READINGS,
    MAX_TEXT_BYTES,
    Facts,
    Reading,
    Value,
)
from tabane.units import shorten

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_LINE = re.compile(r"([^\s:=]+)\s*[:=\s]\s*(\S.*)")
_PAIRS = re.compile(r"\w+=[^,=]*(,\w+=[^,=]*)+|keys=\d+")
_STUB_STATUS = re.compile(
    r"Active connections: (\d+)\s+"
    r"server accepts handled requests(?: request_time)?\s+(\d+) (\d+) (\d+)(?: \d+)?\s+"
    r"Reading: (\d+) Writing: (\d+) Waiting: (\d+)\s*"
)
_STUB_NAMES = (
    *("connections.active", "connections.accepted", "connections.handled", "requests"),
    *("connections.reading", "connections.writing", "connections.waiting"),
)


def parse_output(data: bytes) -> list[Reading]:
    """What a command prints: a JSON object of facts, a JSON array of objects with `facts` and a
    `pid` or an `instance`, or lines of `name value`, `name: value` or `name=value`.

    Raises `ProtocolError` that says what is wrong.
    """
    text = data.decode("utf-8", "backslashreplace").strip()
    if not text.startswith(("{", "[")):
        return [Reading(_parse_lines(text.splitlines()))]
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"what it prints begins like JSON and is none: {error}") from None
    except RecursionError:
        raise ProtocolError("what it prints is nested too deeply") from None
    if isinstance(value, list):
        check_count(value)
        return [_read_part(part) for part in value]
    return [Reading(flatten(value))]


def _parse_lines(lines: Iterable[str]) -> Facts:
    facts: Facts = {}
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        if (found := _LINE.fullmatch(line)) is None:
            raise ProtocolError(f"it prints {shorten(line)}, which is no `name value`")
        facts[found[1]] = read_value(found[2])
    return check_facts(facts)


def _read_part(part: Any) -> Reading:
    if not isinstance(part, dict) or not isinstance(part.get("facts"), dict):
        raise ProtocolError(f"it prints an array with {shorten(part)}, which has no `facts`")
    pid, instance = part.get("pid", 0), part.get("instance", "")
    rest = part.keys() - {"facts", "pid", "instance"}
    if type(pid) is not int or pid < 0 or not isinstance(instance, str) or rest:
        raise ProtocolError(
            f"it prints {shorten(part)}: beside `facts` there may be a `pid` or an `instance`"
        )
    return Reading(flatten(part["facts"]), pid, instance)


def flatten(document: Mapping[str, Any]) -> Facts:
    """Facts of nested objects, with names as `memory.used`. Raises `ProtocolError` for what is no
    fact (lists); null is left out. Not by recursion: nesting is another's to choose."""
    facts: Facts = {}
    waiting = [("", document)]
    while waiting:
        prefix, table = waiting.pop()
        for name, value in table.items():
            if isinstance(value, dict):
                waiting.append((f"{prefix}{name}.", value))
            elif isinstance(value, bool | int | float | str):
                facts[prefix + name] = value
            elif value is not None:
                raise ProtocolError(f"{shorten(prefix + name)} is a list: facts are single values")
            if len(prefix) > MAX_NAME_BYTES:
                raise ProtocolError(f"it nests facts too deeply, as in {shorten(prefix)}")
    return check_facts(facts)


def check_count(readings: Sized) -> None:
    """Raises `ProtocolError` for too many."""
    if len(readings) > MAX_READINGS:
        raise ProtocolError(f"it tells of {len(readings)} things, {MAX_READINGS} are the most")


def check_facts(facts: Facts) -> Facts:
    """The same, with texts cut and numbers that JSON can carry. Raises `ProtocolError`."""
    if len(facts) > MAX_FACTS:
        raise ProtocolError(f"it tells {len(facts)} facts, {MAX_FACTS} are the most: tell fewer")
    for name in facts:
        if not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise ProtocolError(
                f"{shorten(name)} names no fact: 1 to {MAX_NAME_BYTES} printable bytes"
            )
    return {name: _tame(value) for name, value in facts.items()}


def _tame(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
        return float(value) if abs(value) < 1 << 1023 else str(value)[:MAX_TEXT_BYTES]
    if isinstance(value, str):
        return value.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")
    return value


def read_value(text: str) -> Value:
    """The number or truth value that a text says, else the text."""
    if _WHOLE.fullmatch(text):
        return int(text)
    if text in ("true", "false"):
        return text == "true"
    try:
        number = float(text) if text[-1:].isdigit() else math.nan
    except ValueError:
        return text
    return number if math.isfinite(number) else text


def parse_stub_status(data: bytes) -> Facts:
    """nginx's `stub_status` page. Raises `ProtocolError` for another."""
    text = data.decode("utf-8", "backslashreplace")
    if (found := _STUB_STATUS.fullmatch(text)) is None:
        raise ProtocolError(
            f"answers {shorten(text)}, which is no stub_status: name the location that has it"
        )
    return dict(zip(_STUB_NAMES, map(int, found.groups()), strict=True))


def parse_info(data: bytes) -> Facts:
    """Redis's `INFO`: `name:value` lines below `# Section` lines. `db0:keys=1,expires=0` becomes
    `db0.keys` and `db0.expires`. Raises `ProtocolError`."""
    facts: Facts = {}
    for line in data.decode("utf-8", "backslashreplace").splitlines():
        name, colon, value = line.partition(":")
        if not line or line.startswith("#"):
            continue
        if not colon:
            raise ProtocolError(f"says {shorten(line)} in its INFO, which is no `name:value`")
        if _PAIRS.fullmatch(value):
            pairs = (pair.partition("=") for pair in value.split(","))
            facts |= {f"{name}.{key}": read_value(number) for key, _, number in pairs}
        else:
            facts[name] = read_value(value)
    return check_facts(facts)
