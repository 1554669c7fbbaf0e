"""For every test: nothing may be left behind, and real engines get namespaces of their own."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from tabane.testing.leaks import (
    Guard,
    Presence,
    enter_own_namespaces,
    leaked_tasks,
    take_shared_presence,
)

RUN = uuid.uuid4().hex[:8]
NUMBERS = itertools.count(1)
REPORTED: set[str] = set()
WHY_NOT_REAL = pytest.StashKey[str]()
SHARED_PRESENCE = pytest.StashKey[int | None]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[WHY_NOT_REAL] = enter_own_namespaces()
    config.stash[SHARED_PRESENCE] = take_shared_presence()


def pytest_report_header(config: pytest.Config) -> str:
    why = config.stash[WHY_NOT_REAL]
    if not why:
        return "real engines: in network and mount namespaces of this run's own"
    return f"real engines: their tests are left out, because {why}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.stash[WHY_NOT_REAL]:
        return
    left_out = [item for item in items if item.get_closest_marker("real")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def no_leaks_at_the_end(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """What outlives its test on purpose, as a module's shared cluster, ends with the run."""
    isolated = not request.config.stash[WHY_NOT_REAL]
    guard = Guard(RUN, machine=isolated, files=tmp_path_factory.getbasetemp())
    yield
    fail_for(guard.close())


@pytest.fixture(scope="session")
def presence(request: pytest.FixtureRequest) -> Iterator[Presence]:
    presence = Presence(request.config.stash[SHARED_PRESENCE])
    yield presence
    presence.close()


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, no_leaks_at_the_end: None) -> Iterator[None]:
    """Set up before and closed after all else that belongs to one test."""
    real = request.node.get_closest_marker("real") is not None
    presence = request.getfixturevalue("presence") if real else None
    nodes = request.node.get_closest_marker("nodes") is not None
    guard = Guard(f"{RUN}-{next(NUMBERS)}", machine=real, presence=presence, nodes=nodes)
    yield
    fail_for(guard.close())


@pytest.fixture(autouse=True)
def no_leaked_tasks(request: pytest.FixtureRequest, no_leaks: None) -> None:
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("watched_tasks")


@pytest.fixture
async def watched_tasks() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    fail_for(await leaked_tasks(before))


def fail_for(found: list[str]) -> None:
    found = [phrase for phrase in found if phrase not in REPORTED]
    REPORTED.update(found)
    if found:
        pytest.fail("left behind: " + "; ".join(found), pytrace=False)
