"""What is stored becomes routes and floors; what no node can work with stops none of the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tabane.gateway.activation import AppChanged
from tabane.model import App, AppName, Reactive
from tabane.node.catalog import Catalog
from tabane.store.api import Change, Entry

encode = msgspec.json.encode
GOOD, BAD = App("good", "host"), App("bad", "host", reactive=Reactive(min=10**30))
STORED = {
    "apps/default/bad": encode(BAD),
    "apps/default/broken": b"{",
    "apps/default/good": encode(GOOD),
}


class Node:
    """What the catalog needs of an agent; `told` is what it did with the changes."""

    def __init__(self, stored: dict[str, bytes]) -> None:
        entries = [Entry(key, value, 1) for key, value in sorted(stored.items())]
        self.told: list[Any] = []
        self.joined = False
        self.nodes = self.settling = SimpleNamespace()
        self.replica = SimpleNamespace(
            get={entry.key: entry for entry in entries}.get,
            range=lambda prefix: [entry for entry in entries if entry.key.startswith(prefix)],
        )
        self.home = SimpleNamespace(
            ledger=lambda key: object(), handle=self._handle, on_store=lambda: None
        )
        self.gateways = SimpleNamespace(tell_routes=lambda *routes: self.told.append(routes))
        self.config = SimpleNamespace(node=SimpleNamespace(datacenter="tokyo"))
        self.images = SimpleNamespace()
        self.tasks = SimpleNamespace(start=lambda name, work: work.close())

    def _handle(self, event: AppChanged) -> None:
        if event.key == "default/cursed":
            raise ValueError("broken")
        self.told.append(event)

    def spread_soon(self) -> None:
        self.told.append("spread")


def test_apps_that_no_node_can_work_with_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    catalog = Catalog(Node(STORED))  # type: ignore[arg-type]
    assert list(catalog.all_apps()) == [GOOD]
    assert catalog.app(AppName("default/bad")) is catalog.app(AppName("default/broken")) is None
    assert "apps/default/bad is left out: its numbers" in caplog.text
    assert "apps/default/broken is left out: " in caplog.text


def test_a_change_that_cannot_be_taken_in_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    node = Node({"floors/default/good": b"{}"})
    cursed = App("cursed", "host")
    stored = {"apps/default/cursed": encode(cursed)} | STORED
    changes = tuple(Change(key, value, 7) for key, value in stored.items())
    Catalog(node).on_changes(changes)  # type: ignore[arg-type]
    assert "apps/default/cursed of revision 7 is not taken in" in caplog.text
    assert AppChanged(GOOD.key, GOOD) in node.told
    assert ([cursed, GOOD], [BAD.key, "default/broken"]) in node.told
    assert node.told[-1] == "spread"


def test_apps_of_which_nothing_is_kept_are_not_spread_nor_their_images_looked_for_one_by_one() -> (
    None
):
    node = Node({})
    looked: list[str] = []
    node.images = SimpleNamespace(prepare=None)

    def start(name: str, work: Any) -> None:
        looked.append(name)
        work.close()

    node.tasks = SimpleNamespace(start=start)
    apps = [App(f"app-{number}", "host") for number in range(300)]
    changes = tuple(Change(f"apps/{app.key}", encode(app), 7) for app in apps)
    Catalog(node).on_changes(changes)  # type: ignore[arg-type]
    assert "spread" not in node.told
    assert looked == ["image host"], "one task for all of them"
    routes = [told for told in node.told if isinstance(told, tuple)]
    assert routes == [(apps, [])], "gateways get one message"


@pytest.mark.parametrize(
    ("known", "stored", "is_over", "told"),
    [(None, 2, False, []), (None, 2, True, [2]), (1, 2, False, []), (3, 2, False, [2])],
)
def test_more_is_kept_only_once_it_is_known_what_runs(
    known: int | None, stored: int, is_over: bool, told: list[int]
) -> None:
    node = Node({"floors/default/hello": encode({"tokyo": stored})})
    node.joined = True
    node.nodes = SimpleNamespace(is_home=lambda key: True)
    node.settling = SimpleNamespace(is_over=is_over)
    ledger = SimpleNamespace(floor=known) if known is not None else None
    node.home = SimpleNamespace(
        ledger=lambda key: ledger, about=lambda key, event: node.told.append(event.floor)
    )
    Catalog(node).apply_floors()  # type: ignore[arg-type]
    assert node.told == told
