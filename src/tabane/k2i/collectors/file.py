"""The file that says what a node collects: TOML with a `[[collect]]` table for each collector."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from tabane.errors import SpecError
from tabane.k2i.collectors import registry
from tabane.k2i.collectors.api import Setting
from tabane.k2i.collectors.command import run_here
from tabane.k2i.collectors.dial import NodeDial
from tabane.k2i.collectors.runner import Job
from tabane.model import Collect
from tabane.spec import error_of, read_fields, read_text
from tabane.spec_fields import NODE_COLLECT, check_collect, make_collect
from tabane.spec_readers import Mistake, Tables

FIELDS = {
    "collect": Tables("collect", make_collect, NODE_COLLECT, ("kind",), check_collect, most=64)
}


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


def load_jobs(path: Path) -> list[Job]:
    """What it asks for, to be run from this machine. Raises `SpecError`."""
    return [_job(collect) for collect in load_collects(path)]


def _job(collect: Collect) -> Job:
    return Job(collect, lambda: registry.make(Setting(collect, NodeDial(), run_here)))
