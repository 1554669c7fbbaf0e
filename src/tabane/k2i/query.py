"""Which rows an answer has, which of their fields, in which order: what may be asked of any list.

Plain functions over msgspec structs. A `Parameter` is the one place that says what it means:
requests are read by it, the published description of the API is made from it, and what none is for
is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, get_origin

import msgspec

from tabane.errors import UsageError
from tabane.units import shorten

Row = dict[str, Any]
MOST_ROWS = 1_000_000
UNITS = ("_kib", "_s")
"""Ends of fields' names that may be left out: `rss` is `rss_kib`."""
NAMING = ("fields", "group", "sum", "sort")
"""Parameters that name fields."""
MOST_VALUES = 1000
"""Of one parameter."""

_WORD = re.compile(r"-?[a-z][a-z0-9_]*")
_NUMBER = re.compile(r"[0-9]{1,10}")


Schema = dict[str, Any]
"""JSON Schema's. An array stands for values with commas between them."""


class Parameter(NamedTuple):
    """`schema` may depend on the rows that are asked for; `parse` raises `UsageError`."""

    schema: Schema | Callable[[type[msgspec.Struct]], Schema]
    meaning: str
    parse: Callable[[str], Any]
    required: bool = False


class Query(NamedTuple):
    """What was asked, understood. `filters` by field: a row has one of the values in each."""

    filters: tuple[tuple[str, frozenset[Any]], ...] = ()
    fields: tuple[str, ...] = ()
    group: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    sort: tuple[tuple[str, bool], ...] = ()
    """Fields, and whether the largest come first."""
    limit: int | None = None
    options: Mapping[str, Any] = {}
    """What else its kind of question knows, by parameter."""

    @property
    def is_grouped(self) -> bool:
        return bool(self.group or self.sums)

    @property
    def hidden(self) -> tuple[str, ...]:
        """Fields that rows are sorted by and do not show: nodes tell them, so that rows of several
        can be put in order."""
        keys = (name for name, _ in self.sort)
        return tuple(name for name in keys if self.fields and name not in self.fields)

    @property
    def is_merged(self) -> bool:
        """Whether rows of several nodes cannot just stand one after the other."""
        return self.is_grouped or bool(self.sort) or self.limit is not None


def _split(text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    if not all(values):
        raise UsageError("a value between two commas is empty")
    if len(values) > MOST_VALUES:
        raise UsageError(f"more than {MOST_VALUES} values")
    return values


def _words(text: str) -> tuple[str, ...]:
    values = _split(text)
    for value in values:
        if not _WORD.fullmatch(value):
            raise UsageError(f"{shorten(value)} is no field's name")
    if len(set(values)) < len(values):
        raise UsageError("a field is named twice")
    return values


def number(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise UsageError(f"{shorten(text)} is no whole number")
    return int(text)


def _limit(text: str) -> int:
    count = number(text)
    if not 1 <= count <= MOST_ROWS:
        raise UsageError(f"{count} is not from 1 to {MOST_ROWS}")
    return count


def any_text(text: str) -> frozenset[str]:
    return frozenset(_split(text))


def one_text(text: str) -> frozenset[str]:
    if not text:
        raise UsageError("it is empty")
    return frozenset([text])


def flag(text: str) -> bool:
    if text not in ("yes", "no"):
        raise UsageError(f"{shorten(text)} is neither yes nor no")
    return text == "yes"


def numbers(text: str) -> frozenset[int]:
    return frozenset(map(number, _split(text)))


def _apps(text: str) -> frozenset[str]:
    return frozenset(name if "/" in name else f"default/{name}" for name in _split(text))


def _sort(text: str) -> tuple[tuple[str, bool], ...]:
    return tuple((word.removeprefix("-"), word.startswith("-")) for word in _words(text))


def list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MOST_VALUES}


def _field(row: type[msgspec.Struct]) -> Schema:
    return list_of({"type": "string", "enum": list(attributes_of(row))}) | {"uniqueItems": True}


def _number_field(row: type[msgspec.Struct]) -> Schema:
    return list_of({"type": "string", "enum": sorted(numbers_of(row))}) | {"uniqueItems": True}


TEXT: Schema = {"type": "string", "minLength": 1}
LIST = list_of({"type": "string", "pattern": "^[^,]+$"})
PIDS = list_of({"type": "integer", "minimum": 0, "maximum": 9_999_999_999})
FLAG: Schema = {"type": "string", "enum": ["yes", "no"], "default": "no"}
_SORT = list_of({"type": "string", "pattern": "^-?[a-z][a-z0-9_]*$"}) | {"uniqueItems": True}
_COUNT: Schema = {"type": "integer", "minimum": 1, "maximum": MOST_ROWS}

PLACE: dict[str, Parameter] = {
    "dc": Parameter(LIST, "Only of these data centers.", any_text),
    "node": Parameter(LIST, "Only of these nodes: `node` or `dc/node`.", any_text),
}
OWNER: dict[str, Parameter] = {
    "namespace": Parameter(LIST, "Only of apps in these namespaces.", any_text),
    "app": Parameter(LIST, "Only of these apps; `hello` means `default/hello`.", _apps),
    "instance": Parameter(LIST, "Only of these instances.", any_text),
    "container": Parameter(LIST, "Only in these containers of instances with several.", any_text),
    "class": Parameter(LIST, "Only of instances of these classes.", any_text),
    "user": Parameter(LIST, "Only of these users, by name or number.", any_text),
    "pid": Parameter(PIDS, "Only of the processes with these numbers.", numbers),
    "name": Parameter(TEXT, "Only of processes with exactly this name.", one_text),
}
INSIDE: dict[str, Parameter] = {
    "inside": Parameter(
        LIST,
        "Only processes that were found by these, `sandbox`, `guest` or `wasm`; `none`: those of "
        "the node itself.",
        lambda text: frozenset("" if word == "none" else word for word in _split(text)),
    ),
}
COLLECTED: dict[str, Parameter] = {
    "collector": Parameter(LIST, "Only what the collectors of these names tell.", any_text),
    "kind": Parameter(LIST, "Only what collectors of these kinds tell.", any_text),
}
SHAPE: dict[str, Parameter] = {
    "fields": Parameter(_field, "These fields alone.", _words),
    "sort": Parameter(_SORT, "Order by these fields; `-` before one: largest first.", _sort),
    "limit": Parameter(_COUNT, "The first so many rows.", _limit),
}
GROUPS: dict[str, Parameter] = {
    "group": Parameter(_field, "A row for each value of these fields, with `count`.", _words),
    "sum": Parameter(_number_field, "The sums of these fields, of each group or all.", _words),
}
SCOPE: Schema = {"type": "string", "enum": ["node", "cluster"], "default": "node"}


def parse_query(
    params: Mapping[str, str], known: Mapping[str, Parameter], kind: type[msgspec.Struct]
) -> Query:
    """What `params` ask of rows of this kind. Raises `UsageError` for what is not `known`."""
    values = {name: parse_value(name, text, known) for name, text in params.items()}
    if missing := [name for name, this in known.items() if this.required and name not in params]:
        raise UsageError(f"{missing[0]}: must be given. {known[missing[0]].meaning}")
    values |= {name: _in_full(values[name], kind) for name in NAMING if name in values}
    filters = {**PLACE, **OWNER, **INSIDE, **COLLECTED}
    common = {*filters, *SHAPE, *GROUPS}
    query = Query(
        filters=tuple((name, value) for name, value in values.items() if name in filters),
        fields=values.get("fields", ()),
        group=values.get("group", ()),
        sums=values.get("sum", ()),
        sort=values.get("sort", ()),
        limit=values.get("limit"),
        options={name: value for name, value in values.items() if name not in common},
    )
    _check(query, kind)
    return query


def _in_full(words: tuple[Any, ...], kind: type[msgspec.Struct]) -> tuple[Any, ...]:
    """Names of fields with their units, where these were left out. Raises `UsageError`."""

    def name(word: str) -> str:
        full = (word + unit for unit in ("", *UNITS))
        return next((one for one in full if one in attributes_of(kind)), word)

    found = [name(word) if isinstance(word, str) else (name(word[0]), word[1]) for word in words]
    if len({word if isinstance(word, str) else word[0] for word in found}) < len(found):
        raise UsageError("a field is named twice, with its unit and without")
    return tuple(found)


def parse_value(name: str, text: str, known: Mapping[str, Parameter]) -> Any:
    """One parameter's value. Raises `UsageError`."""
    if name not in known:
        there_is = f"there are {', '.join(known)}" if known else "it takes none"
        raise UsageError(f"there is no parameter {shorten(name)} here: {there_is}")
    try:
        return known[name].parse(text)
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}") from None


def _check(query: Query, kind: type[msgspec.Struct]) -> None:
    """Raises `UsageError` for fields that are not there, or cannot be summed."""
    attributes = attributes_of(kind)
    for name, words in (("fields", query.fields), ("group", query.group), ("sum", query.sums)):
        if missing := [word for word in words if word not in attributes]:
            raise UsageError(f"{name}: there is no field {missing[0]}: {', '.join(attributes)}")
    if texts := [word for word in query.sums if word not in numbers_of(kind)]:
        raise UsageError(f"sum: {texts[0]} is no number")
    if query.is_grouped and query.fields:
        raise UsageError("fields: not with group and sum, whose rows have the fields named there")
    if twice := [word for word in query.sums if word in query.group]:
        raise UsageError(f"sum: {twice[0]} is what is grouped by")
    groups = (*query.group, "count", *query.sums)
    columns = groups if query.is_grouped else attributes
    keys = [word for word, _ in query.sort]
    if unknown := [word for word in keys if word not in columns]:
        raise UsageError(f"sort: rows have no {unknown[0]}: {', '.join(columns)}")
    if many := [word for word in (*query.group, *keys) if word in collections_of(kind)]:
        raise UsageError(f"{many[0]} is no single value: rows are not grouped or sorted by it")


@cache
def attributes_of(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The names of the fields in JSON, and in Python."""
    return {field.encode_name: field.name for field in msgspec.structs.fields(kind)}


@cache
def numbers_of(kind: type[msgspec.Struct]) -> frozenset[str]:
    """The fields that can be summed, by their names in JSON."""
    numeric = (int, float, int | None, float | None)
    fields = msgspec.structs.fields(kind)
    return frozenset(field.encode_name for field in fields if field.type in numeric)


@cache
def collections_of(kind: type[msgspec.Struct]) -> frozenset[str]:
    """The fields that have several values, by their names in JSON."""
    fields = msgspec.structs.fields(kind)
    return frozenset(f.encode_name for f in fields if get_origin(f.type) in (list, dict, tuple))


def choose(rows: Iterable[Any], filters: Iterable[tuple[str, frozenset[Any]]]) -> list[Any]:
    """Those that pass every filter."""
    chosen = list(rows)
    for name, values in filters:
        if name == "node":
            chosen = [r for r in chosen if r.node in values or f"{r.dc}/{r.node}" in values]
        elif name == "user":
            chosen = [r for r in chosen if r.user in values or str(r.uid) in values]
        else:
            get = attrgetter("isolation" if name == "class" else name)
            chosen = [row for row in chosen if get(row) in values]
    return chosen


def arrange(rows: Sequence[Any], query: Query, kind: type[msgspec.Struct]) -> bytes:
    """One node's chosen rows as a JSON array, in order, cut, and with the fields asked (and those
    that are `hidden`); or all its groups, for one that is small here may be large with those of
    other nodes."""
    if query.is_grouped:
        return msgspec.json.encode(_group(rows, query, kind))
    attributes = attributes_of(kind)
    rows = list(rows)
    for name, largest_first in reversed(query.sort):
        _sort_by(rows, attrgetter(attributes[name]), largest_first)
    rows = rows[: query.limit]
    if query.fields:
        names = (*query.fields, *query.hidden)
        getters = [(name, attrgetter(attributes[name])) for name in names]
        return msgspec.json.encode([{name: get(row) for name, get in getters} for row in rows])
    return msgspec.json.encode(rows)


def merge(parts: Iterable[bytes], query: Query) -> bytes:
    """Several nodes' arrays, each made by `arrange`, as one; without decoding them if it can be."""
    parts = tuple(parts)
    if not query.is_merged or (len(parts) == 1 and not (query.is_grouped or query.hidden)):
        return b"[" + b",".join(part[1:-1] for part in parts if len(part) > 2) + b"]"
    rows: list[Row] = [row for part in parts for row in msgspec.json.decode(part)]
    if query.is_grouped:
        rows = _add_up(rows, query)
    return msgspec.json.encode(_finish(rows, query))


def _group(rows: Iterable[Any], query: Query, kind: type[msgspec.Struct]) -> list[Row]:
    attributes = attributes_of(kind)
    names = (*query.group, *query.sums)
    getters = [(name, attrgetter(attributes[name])) for name in names]
    return _add_up(({n: get(row) for n, get in getters} | {"count": 1} for row in rows), query)


def _add_up(rows: Iterable[Row], query: Query) -> list[Row]:
    """One row for each group. What is unknown (null) does not count."""
    groups: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in query.group)
        into = groups.get(key)
        if into is None:
            into = groups[key] = {name: row[name] for name in query.group}
            into |= dict.fromkeys(("count", *query.sums), 0)
        for name in ("count", *query.sums):
            into[name] += row[name] or 0
    for row in groups.values():
        row |= {name: round(row[name], 3) for name in query.sums}
    return list(groups.values())


def _finish(rows: list[Row], query: Query) -> list[Row]:
    for name, largest_first in reversed(query.sort):
        _sort_by(rows, itemgetter(name), largest_first)
    rows = rows[: query.limit]
    for name in query.hidden:
        for row in rows:
            del row[name]
    return rows


def _sort_by(rows: list[Any], get: Callable[[Any], Any], largest_first: bool) -> None:
    """Stable; what is unknown comes last either way."""
    rows.sort(key=lambda row: _order_of(get(row), largest_first), reverse=largest_first)


def _order_of(value: Any, largest_first: bool) -> tuple[bool, Any]:
    return ((value is not None) == largest_first, 0 if value is None else value)
