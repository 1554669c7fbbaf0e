from __future__ import annotations

import inspect
import re

import pytest

from tabane import errors
from tabane.errors import (
    Busy,
    Closed,
    Denied,
    EngineError,
    SpecError,
    SystemFault,
    TabaneError,
    Unauthenticated,
    Unavailable,
    UsageError,
)

ALL = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, TabaneError)
]
EXAMPLES = {
    SpecError: SpecError("app.toml", 3, "port", "must be 1 to 65535"),
}


def drawn_tree() -> dict[str, str]:
    """Name of each class in the docstring's tree, and of the one it hangs from."""
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)(?:  |$)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        path[depth:] = [match[2]]
        parents[match[2]] = path[depth - 1] if depth else "Exception"
    return parents


def test_the_tree_drawn_is_the_tree_built() -> None:
    assert drawn_tree() == {error.__name__: error.__base__.__name__ for error in ALL}


def test_each_error_has_a_word_of_its_own() -> None:
    assert len({error.code for error in ALL}) == len(ALL)


def test_what_passes_by_itself_may_be_tried_again() -> None:
    for error in ALL:
        assert error.retry == issubclass(error, Unavailable | Closed), error


def test_the_text_is_the_message() -> None:
    for error in ALL:
        example = EXAMPLES.get(error) or error("the disk is full: remove something")
        assert str(example) == example.message


def test_blame_is_told_by_the_class() -> None:
    assert issubclass(Unauthenticated, Denied) and issubclass(Denied, UsageError)
    assert not issubclass(Busy, SystemFault)


def test_unavailable_says_when_to_come_back() -> None:
    assert Busy("the queue of hello is full").retry_after_s == 1.0
    assert Busy("the queue of hello is full", retry_after_s=2.5).retry_after_s == 2.5


@pytest.mark.parametrize(
    ("line", "field", "text"),
    [
        (3, "port", "app.toml:3: port: is missing"),
        (3, "", "app.toml:3: is missing"),
        (0, "port", "app.toml: port: is missing"),
        (0, "", "app.toml: is missing"),
    ],
)
def test_a_spec_error_names_the_place(line: int, field: str, text: str) -> None:
    error = SpecError("app.toml", line, field, "is missing")
    assert str(error) == text
    assert (error.file, error.line, error.field, error.problem) == (
        "app.toml",
        line,
        field,
        "is missing",
    )


def test_an_engine_error_carries_what_the_engine_said() -> None:
    error = EngineError("crun failed", argv=("crun", "run"), status=-9, output="no space")
    assert (error.argv, error.status, error.output) == (("crun", "run"), -9, "no space")
