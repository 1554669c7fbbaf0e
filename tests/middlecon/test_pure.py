"""The parts that decide import nothing that does."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

import tabane.middlecon

PURE = (
    *("frames", "session", "receipts", "backlog", "ports", "rooms", "directory", "flow", "tallies"),
    *("relay", "chat", "contained", "agree"),
)
FORBIDDEN = {"asyncio", "socket", "time", "selectors", "threading", "os", "uvloop", "random"}


def imports_of(module: str) -> set[str]:
    spec = importlib.util.find_spec(f"tabane.middlecon.{module}")
    assert spec is not None and spec.origin is not None
    found = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("module", PURE)
def test_no_io_no_clock(module: str) -> None:
    found = imports_of(module)
    assert not {name.partition(".")[0] for name in found} & FORBIDDEN
    of_ours = {name.removeprefix("tabane.middlecon.") for name in found if "middlecon" in name}
    assert of_ours <= set(PURE)


def test_all_public_names_are_there() -> None:
    for name in tabane.middlecon.__all__:
        assert getattr(tabane.middlecon, name)
