"""k2i: which processes run, and which instance and app each belongs to.

Names are loaded when they are first used: those who only ask a k2i need no web server.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tabane.k2i.api import build_router
    from tabane.k2i.client import AsyncClient, Client
    from tabane.k2i.event_feed import EventFeed
    from tabane.k2i.events import Event
    from tabane.k2i.service import K2i, Part, Question
    from tabane.k2i.table import Process, ProcessTable
    from tabane.k2i.v1 import Record

__all__ = [
    "AsyncClient",
    "Client",
    "Event",
    "EventFeed",
    "K2i",
    "Part",
    "Process",
    "ProcessTable",
    "Question",
    "Record",
    "build_router",
]

_HOMES = {
    "AsyncClient": "client",
    "Client": "client",
    "Event": "events",
    "EventFeed": "event_feed",
    "K2i": "service",
    "Part": "service",
    "Process": "table",
    "ProcessTable": "table",
    "Question": "service",
    "Record": "v1",
    "build_router": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"tabane.k2i has no {name}")
    return getattr(import_module(f"tabane.k2i.{_HOMES[name]}"), name)
