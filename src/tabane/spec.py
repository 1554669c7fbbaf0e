"""App files: TOML text to an `App`, or one `SpecError` that says where and what is allowed.

The fields are in `tabane.spec_fields`; here are the rules between them and the search for lines.
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from tabane.errors import SpecError, UsageError
from tabane.model import App, Class
from tabane.reactions import Health
from tabane.spec_fields import FIELDS, REQUIRED, AnyField
from tabane.spec_readers import Mistake, Section, Tables, did_you_mean
from tabane.units import shorten

LONGEST_FILE = 1 << 20
TOO_LONG = "is longer than an app file may be (1 MiB)"


def load_app(path: Path) -> App:
    """Read an app file. Raises `SpecError`, also when the file cannot be read."""
    return parse_app(read_text(path), file=str(path))


def read_text(path: Path) -> str:
    """What an app file says. Raises `SpecError` when it cannot be read or is no text."""
    try:
        with path.open("rb") as file:
            content = file.read(LONGEST_FILE + 1)
        if len(content) > LONGEST_FILE:
            raise SpecError(str(path), 0, "", TOO_LONG)
        return content.decode()
    except OSError as error:
        raise SpecError(str(path), 0, "", f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SpecError(str(path), line, "", "is not UTF-8 text: save it as UTF-8") from error


def parse_app(text: str, *, file: str = "app.toml") -> App:
    """The app that `text` declares. `image` and `source` are what it says there."""
    if len(text) > LONGEST_FILE:
        raise SpecError(file, 0, "", TOO_LONG)
    try:
        document = tomllib.loads(text)
    except RecursionError:
        raise SpecError(file, 0, "", "is nested too deeply for an app file") from None
    except ValueError as error:
        line, problem = _place_of_syntax_error(str(error), text)
        raise SpecError(file, line, "", f"this is not TOML: {problem}") from error
    return read_app(document, file=file, text=text)


def read_app(document: Mapping[str, Any], *, file: str = "app", text: str = "") -> App:
    """The app of a document with the structure of an app file; `text` is searched for lines."""
    try:
        return _build_app(document)
    except Mistake as mistake:
        raise error_of(mistake, file=file, text=text) from None


def error_of(mistake: Mistake, *, file: str, text: str) -> SpecError:
    """What is wrong with a field, with its place in the file's `text`."""
    return SpecError(file, _find_line(text, mistake.field), mistake.field, mistake.message)


def render_app(app: App) -> dict[str, Any]:
    """The document that `read_app` reads as this app (what its author says, with all defaults)."""
    return _show_fields(app, FIELDS)


def _show_fields(value: Any, fields: Mapping[str, AnyField]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, field in fields.items():
        content = getattr(value, field.attribute)
        if isinstance(field, Section):
            shown[name] = _show_fields(content, field.fields)
        elif isinstance(field, Tables):
            if content:
                shown[name] = [_show_fields(each, field.fields) for each in content]
        elif content not in (None, "", ()):
            shown[name] = field.show(content)
    return shown


def read_fields(document: Any, fields: Mapping[str, AnyField], prefix: str = "") -> dict[str, Any]:
    """The model's attributes of a table, in the order of the file."""
    if not isinstance(document, Mapping):
        table = prefix.rstrip(".")
        raise Mistake(table, f"{shorten(document)} is not a table: write [{table}], fields below")
    return dict(_read_field(name, value, fields, prefix) for name, value in document.items())


def _read_field(
    name: str, value: Any, fields: Mapping[str, AnyField], prefix: str
) -> tuple[str, Any]:
    field = fields.get(name)
    path = prefix + (name if name and name.isprintable() else shorten(name))
    if field is None:
        hint = did_you_mean(name, fields)
        raise Mistake(path, f"there is no such field{hint} (allowed here: {', '.join(fields)})")
    if isinstance(field, Section):
        return field.attribute, field.model(**read_fields(value, field.fields, f"{name}."))
    if isinstance(field, Tables):
        return field.attribute, _read_tables(value, field, path)
    try:
        return field.attribute, field.read(value)
    except Mistake as mistake:
        raise Mistake(prefix + mistake.field, mistake.message) from None
    except UsageError as error:
        raise Mistake(path, error.message) from None


def _read_tables(value: Any, tables: Tables, path: str) -> tuple[Any, ...]:
    """Models with names of their own."""
    if not isinstance(value, list):
        raise Mistake(path, f"{shorten(value)} is no array of tables: write [[{path}]]")
    if len(value) > tables.most:
        raise Mistake(path, f"there are {len(value)}, {tables.most} are the most")
    found: dict[str, Any] = {}
    for number, document in enumerate(value, 1):
        place = f"{path}[{number}]"
        said = read_fields(document, tables.fields, f"{place}.")
        for name in tables.required:
            if name not in said:
                raise Mistake(f"{place}.{name}", "is missing")
        model = tables.model(**said)
        try:
            tables.check(model)
        except Mistake as mistake:
            raise Mistake(f"{place}.{mistake.field}", mistake.message) from None
        own = getattr(model, tables.key) or model.kind
        if found.setdefault(own, model) is not model:
            problem = f"another one is called {shorten(own)}: give each a {tables.key}"
            raise Mistake(f"{place}.{tables.key}", problem)
    return tuple(found.values())


def _build_app(document: Mapping[str, Any]) -> App:
    said = read_fields(document, FIELDS)
    for name in REQUIRED:
        if name not in said:
            raise Mistake(name, "is missing: every app has one")
    app = App(**said)
    told = document.get("reactive", {})
    if not app.takes_sessions and "ready" not in told:
        reactive = msgspec.structs.replace(app.reactive, ready="started")
        app = msgspec.structs.replace(app, reactive=reactive)
    if app.volumes and "max" not in told:
        reactive = msgspec.structs.replace(app.reactive, max=1)
        app = msgspec.structs.replace(app, reactive=reactive)
    _check_together(app)
    return _with_sources(app)


def _with_sources(app: App) -> App:
    containers = tuple(
        msgspec.structs.replace(each, image=each.source or app.image) for each in app.containers
    )
    return msgspec.structs.replace(app, source=app.image, containers=containers)


def _check_together(app: App) -> None:
    """The rules between fields."""
    least, most, ready = app.reactive.min, app.reactive.max, app.reactive.ready
    if not app.command and brings_no_command(app.image):
        raise Mistake("command", f"is missing: the image {shorten(app.image)} brings none")
    if app.isolation is Class.AUTO and app.driver:
        raise Mistake("driver", 'has no meaning with class = "auto", which picks one: leave it out')
    if app.isolation is not Class.AUTO and app.reactive.wake_budget_s is not None:
        raise Mistake("reactive.wake_budget", 'has a meaning with class = "auto" only')
    _check_rest(app)
    _check_volumes(app)
    _check_containers(app)
    _check_health(app)
    _check_triggers(app)
    _check_bounds(app)
    if least > most:
        raise Mistake("reactive.min", f"{least} is more than max, {most}: lower it or raise max")
    if app.port is None and app.hosts:
        raise Mistake("port", "is missing: hosts lead to one")
    lacks_port = app.port is None if ready.startswith("http:") else not app.takes_sessions
    if lacks_port and ready not in ("started", "health"):
        raise Mistake("port", f'is missing: ready = "{ready}" needs one, only "started" does not')
    if ready == "health" and not app.health.is_set:
        raise Mistake("reactive.ready", 'is "health", but no check is in [health]')
    if app.protocol == "h2c" and ready.startswith("http:"):
        raise Mistake("reactive.ready", f'"{ready}" asks in HTTP/1.1, and protocol is "h2c"')


def _check_rest(app: App) -> None:
    """What becomes of an instance without sessions, one after the other, and back by a session."""
    reactive = app.reactive
    steps = {
        "freeze_after": reactive.freeze_after_s,
        "checkpoint_after": reactive.checkpoint_after_s,
        "stop_after": reactive.stop_after_s,
    }
    told = [(name, after_s) for name, after_s in steps.items() if after_s is not None]
    for (name, after_s), (later, later_s) in itertools.pairwise(told):
        if not app.takes_sessions:
            raise Mistake(f"reactive.{name}", "needs a port: only a session brings it back")
        if after_s >= later_s:
            problem = f"{after_s:g} s is not before {later}, {later_s:g} s: lower it or raise that"
            raise Mistake(f"reactive.{name}", problem)
    if reactive.checkpoint and not app.takes_sessions:
        raise Mistake("reactive.checkpoint", "needs a port: only a session brings it back")
    if reactive.checkpoint_after_s is not None and app.volumes:
        problem = "is not possible with volumes, whose files might not fit what was put away"
        raise Mistake("reactive.checkpoint_after", problem)
    if reactive.checkpoint and app.volumes:
        problem = "is not possible with volumes, whose files would not fit the memory of a copy"
        raise Mistake("reactive.checkpoint", problem)
    _check_hooks(app)
    if reactive.reclaim and reactive.freeze_after_s is None:
        raise Mistake("reactive.reclaim", "has a meaning with freeze_after only")


def _check_bounds(app: App) -> None:
    resources = app.resources
    bounds = {
        "cpu": (resources.cpu_min, resources.cpu),
        "memory": (resources.memory_min_bytes, resources.memory_bytes),
    }
    for name, (low, high) in bounds.items():
        if low is not None and low > high:
            raise Mistake(f"resources.{name}_min", f"is more than {name}: lower it")
        if low is not None and not app.takes_sessions:
            raise Mistake(f"resources.{name}_min", "needs a port: it rises with sessions")


def _check_hooks(app: App) -> None:
    hook = app.hooks.restored
    saved = app.reactive.checkpoint or app.reactive.checkpoint_after_s is not None
    if hook and not saved:
        where = "reactive.checkpoint = true or reactive.checkpoint_after"
        raise Mistake("hooks.restored", f"has a meaning with {where} only")
    if hook.startswith("http:") and (app.port is None or app.protocol == "h2c"):
        raise Mistake("hooks.restored", "asks at port in HTTP/1.1, which it does not speak")


def _check_triggers(app: App) -> None:
    if app.triggers and app.port is None:
        raise Mistake("port", "is missing: what a trigger brings is a request to it")
    rooms = [trigger.room for trigger in app.triggers]
    for number, room in enumerate(rooms, 1):
        if room and room in rooms[: number - 1]:
            raise Mistake(f"triggers[{number}].room", "is there twice: one request has a message")


def _check_health(app: App) -> None:
    health = app.health
    asked = {"http": health.http, "tcp": health.tcp, "command": health.command}
    named = [name for name, given in asked.items() if given]
    if len(named) > 1:
        raise Mistake(f"health.{named[1]}", f"is one check too many beside {named[0]}: leave one")
    if not named:
        if health != Health():
            raise Mistake("health", "says no check: write one of http, tcp, command")
        return
    if health.timeout_s > health.interval_s:
        raise Mistake("health.timeout", "is longer than the interval: shorten it")
    if not health.command and not app.listens:
        raise Mistake(f"health.{named[0]}", "needs a port to ask at: use command, or name a port")
    if health.http and (app.port is None or app.protocol == "h2c"):
        raise Mistake("health.http", "asks at port in HTTP/1.1, which it does not speak: use tcp")


def _check_volumes(app: App) -> None:
    """An instance has the volumes for itself, so there is one at most."""
    if not app.volumes:
        return
    if app.isolation is Class.AUTO:
        raise Mistake("volumes", 'cannot be shared by the cohorts of class = "auto": name a class')
    if app.reactive.max > 1:
        raise Mistake("reactive.max", f"is {app.reactive.max}: with volumes there is one instance")
    paths = sorted(volume.path for volume in app.volumes)
    for outer, inner in itertools.pairwise(paths):
        if f"{inner}/".startswith(f"{outer}/"):
            raise Mistake("volumes", f"{shorten(inner)} is in {shorten(outer)}: one in the other")


def _check_containers(app: App) -> None:
    known = [volume.name for volume in app.volumes]
    for number, container in enumerate(app.containers, 1):
        place, image = f"containers[{number}]", container.source or app.image
        if not container.command and brings_no_command(image):
            problem = f"is missing: the image {shorten(image)} brings none"
            raise Mistake(f"{place}.command", problem)
        for name in container.volumes:
            if name not in known:
                there = ", ".join(known) or "it has none"
                problem = f"{shorten(name)} is no volume of the app ({there}): write [[volumes]]"
                raise Mistake(f"{place}.volumes", problem)


def brings_no_command(image: str) -> bool:
    return image == "host" or image.startswith("rootfs:")


_HEADER = re.compile(r"\s*\[\[?([^\[\]]+)\]")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*'|\s*\.\s*)+?)\s*=""")


def _find_line(text: str, field: str) -> int:
    """The line that says `field`, else the one of the table it belongs in, else 0.

    The parser tells no lines, so this looks for keys and table headers; a multi-line string that
    looks like them can mislead it.
    """
    table, nearest = "", 0
    counts: Counter[str] = Counter()
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            path = table = _normal(header[1])
            if line.lstrip().startswith("[["):
                counts[path] += 1
                path = table = f"{path}[{counts[path]}]"
        elif key := _KEY.match(line):
            path = ".".join(filter(None, (table, _normal(key[1]))))
        else:
            continue
        if path == field:
            return number
        if field.startswith(f"{path}."):
            nearest = number
    return nearest


def _normal(path: str) -> str:
    """A dotted key without quotes and blanks."""
    return ".".join(part.strip().strip("\"'") for part in path.split("."))


def _place_of_syntax_error(message: str, text: str) -> tuple[int, str]:
    """The line that the parser names in its message, its only way to say it before Python 3.14."""
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if place is None:
        return 0, message
    return int(place[1] or text.rstrip().count("\n") + 1), message[: place.start()]
