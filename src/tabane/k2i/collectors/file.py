"""The file that says what a node collects: TOML with a `[[collect]]` table for each collector."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from tabane.errors import SpecError
from tabane.model import Collect
from tabane.spec import error_of, read_fields, read_text
from tabane.spec_fields import NODE_COLLECT, Mistake, Tables, check_collect

FIELDS = {"collect": Tables("collect", Collect, NODE_COLLECT, ("kind",), check_collect, most=64)}


def load_collects(path: Path) -> tuple[Collect, ...]:
    """What it asks for. Raises `SpecError`, also when it cannot be read."""
    text, file = read_text(path), str(path)
    try:
        document: dict[str, Any] = tomllib.loads(text)
        read: dict[str, tuple[Collect, ...]] = dict(read_fields(document, FIELDS))
    except RecursionError:
        raise SpecError(file, 0, "", "is nested too deeply") from None
    except Mistake as mistake:
        raise error_of(mistake, file=file, text=text) from None
    except ValueError as error:
        raise SpecError(file, 0, "", f"this is not TOML: {error}") from None
    return read.get("collect", ())
