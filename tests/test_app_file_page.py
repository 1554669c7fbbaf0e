"""The page about app files names every field there is, and what is its default."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tabane.model import App
from tabane.spec import parse_app, render_app
from tabane.spec_fields import FIELDS
from tabane.spec_readers import Section, Tables

PAGE = (Path(__file__).parent.parent / "docs" / "app-file.md").read_text()
SMALL = ("network", "placement", "security", "services")
"""Sections that share one table, with whole names."""


def paths() -> list[tuple[str, str]]:
    """Each field: its section, and its name as the page has it."""
    found = []
    for name, field in FIELDS.items():
        if isinstance(field, Section):
            prefix = f"{name}." if name in SMALL else ""
            found += [(name, prefix + inner) for inner in field.fields]
        elif isinstance(field, Tables):
            found += [(f"[{name}]", f"{name}.{inner}") for inner in field.fields]
        else:
            found.append(("", "[env]" if name == "env" else name))
    return found


@pytest.mark.parametrize(("section", "name"), paths())
def test_every_field_is_named(section: str, name: str) -> None:
    assert re.search(rf"^\| `{re.escape(name)}` \| .+ \| .+ \|$", PAGE, re.MULTILINE), name
    assert f"`[{section}]`" in PAGE or not section


@pytest.mark.parametrize("section", ["resources", "reactive"])
def test_defaults_are_true(section: str) -> None:
    shown = render_app(App("x", "host", port=80))[section]
    for name, value in shown.items():
        written = json.dumps(value)
        row = re.search(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
        assert row is not None
        assert f"`{written}`" in row[0].rpartition(" | ")[2] or written in row[0], row[0]


def test_the_shortest_is_enough() -> None:
    (example,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert parse_app(example).name == "hello"
