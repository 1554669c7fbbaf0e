"""A command whose client leaves is ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from tests.api.conftest import Api

from tabane.model import State
from tabane.runtimes.api import ExecResult

ARGV = {"argv": ["cat"]}


class Driver:
    """Runs a command until it is let go, or reads its input to the end."""

    def __init__(self) -> None:
        self.began = asyncio.Event()
        self.was_cancelled = False

    async def exec(
        self, handle: object, argv: tuple[str, ...], *, stdin: AsyncIterator[bytes] | None, **_: Any
    ) -> ExecResult:
        try:
            said = b"".join([block async for block in stdin]) if stdin is not None else b""
            self.began.set()
            if argv == ("cat",):
                return ExecResult(0, said, b"")
            await asyncio.Event().wait()
        except BaseException:
            self.was_cancelled = True
            raise
        raise AssertionError


@pytest.fixture
def driver(api: Api) -> Driver:
    driver = Driver()
    instance = SimpleNamespace(app="default/hello", state=State.READY)
    running = SimpleNamespace(driver=driver, instance=instance, record=SimpleNamespace(handle=1))
    api.agent.executor = SimpleNamespace(get=lambda instance: running)
    api.agent.audit = SimpleNamespace(add=lambda line: None)
    api.agent.clock = SimpleNamespace(wall=lambda: 0.0)
    return driver


EXEC, EXEC_STDIN = "/api/v1/instances/abc/exec", "/api/v1/instances/abc/exec-stdin"


async def test_who_stays_gets_the_answer(api: Api, driver: Driver) -> None:
    answer = await api.ask("POST", EXEC, ARGV)
    assert answer.json() == {"code": 0, "stdout": "", "stderr": ""}
    answer = await api.ask("POST", EXEC_STDIN, raw=b'{"argv": ["cat"]}\nabc')
    assert answer.json()["stdout"] == "YWJj"


@pytest.mark.parametrize(
    ("path", "body"), [(EXEC, b'{"argv": ["sleep"]}'), (EXEC_STDIN, b'{"argv": ["sleep"]}\nabc')]
)
async def test_who_leaves_ends_it(api: Api, driver: Driver, path: str, body: bytes) -> None:
    asking = asyncio.ensure_future(api.ask("POST", path, raw=body))
    await driver.began.wait()
    api.leave()
    await asking
    assert driver.was_cancelled


async def test_who_leaves_before_the_input_ends_ends_it(api: Api, driver: Driver) -> None:
    api.leave()
    await api.ask("POST", EXEC_STDIN, raw=b'{"argv": ["sleep"]}\nabc', more=True)
    assert driver.was_cancelled
    assert not driver.began.is_set()
