"""The tests of HTTP and TCP run on both event loops: uvloop serves, asyncio is the reference."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

# libuv keeps its signal pipe as long as the process lives: made here, it is no test's leak.
uvloop.run(asyncio.sleep(0))

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, LoopFactory]:
    loops: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop}
    if item.path.name.startswith(("test_http", "test_tcp")):
        loops["uvloop"] = uvloop.new_event_loop
    return loops
