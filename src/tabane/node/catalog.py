"""The apps as this node's replica of the store has them, and what follows when they change.

One app that no node can work with (of another version, or damaged) is left out, with a word in the
log: it keeps none of the others from being routed, woken and kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tabane.errors import TabaneError
from tabane.gateway.activation import AppChanged, FloorChanged
from tabane.model import App, AppName, Trust, app_of_cohort, name_cohort
from tabane.node.control import APPS, FLOORS, parse_floors, sound_app
from tabane.store.api import Change, Entry

if TYPE_CHECKING:
    from tabane.node.agent import Agent

log = logging.getLogger(__name__)


class StoredApps:
    """The apps of a moment, by name, each unpacked when it is its turn: all of them at once would
    take many times what is stored."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        """With those that are left out."""
        return len(self._entries)

    def __iter__(self) -> Iterator[App]:
        for entry in self._entries:
            if (app := sound_app(entry.key, entry.value)) is not None:
                yield app


class Catalog:
    """See the module's text."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def app(self, key: AppName) -> App | None:
        entry = self._agent.replica.get(APPS + key)
        return sound_app(entry.key, entry.value) if entry is not None else None

    def cohort(self, cohort: AppName) -> App | None:
        """What of an app shares its instances; None when there is no such app or cohort of it."""
        return _cohort_of(self.app(app_of_cohort(cohort)[0]), cohort)

    def all_apps(self) -> StoredApps:
        return StoredApps(self._agent.replica.range(APPS))

    def floor(self, key: AppName) -> int:
        """This data center's share of the app's `min`."""
        entry = self._agent.replica.get(FLOORS + key)
        shares = parse_floors(entry.value) if entry is not None else {}
        return shares.get(self._agent.config.node.datacenter, 0)

    def on_changes(self, changes: tuple[Change, ...]) -> None:
        """Apps were deployed, removed or scaled: tell the home and this node's gateways."""
        changed: list[App] = []
        gone: list[AppName] = []
        for change in changes:
            try:
                self._on_change(change, changed, gone)
            except Exception:
                log.exception("%s of revision %d is not taken in", change.key, change.revision)
        self._agent.home.on_store()
        self._agent.gateways.tell_routes(changed, gone)
        self.prefetch(changed)
        if any(self._agent.replica.get(FLOORS + app.key) for app in changed):
            self._agent.spread_soon()

    def _on_change(self, change: Change, changed: list[App], gone: list[AppName]) -> None:
        if change.key.startswith(APPS):
            key = AppName(change.key.removeprefix(APPS))
            app = sound_app(change.key, change.value) if change.value is not None else None
            if app is not None:
                changed.append(app)
            else:
                gone.append(key)
            for cohort in (key, *(name_cohort(key, trust) for trust in Trust)):
                if self._agent.home.ledger(cohort) is not None:
                    self._agent.home.handle(AppChanged(cohort, _cohort_of(app, cohort)))
                elif app is None:
                    self._agent.home.forget(cohort)
            self._on_floor(key)
        elif change.key.startswith(FLOORS):
            self._on_floor(AppName(change.key.removeprefix(FLOORS)))

    def apply_floors(self) -> None:
        """Keep what is to be kept."""
        for entry in self._agent.replica.range(FLOORS):
            self._on_floor(AppName(entry.key.removeprefix(FLOORS)))

    def _on_floor(self, app: AppName) -> None:
        """What is kept of an app of class `auto` is for those who may call it unknown."""
        known_app, floor = self.app(app), self.floor(app)
        key = known_app.cohorts()[0].cohort if known_app is not None else app
        if not self._agent.joined or not self._agent.nodes.is_home(key):
            return
        ledger = self._agent.home.ledger(key)
        known = ledger.floor if ledger is not None else 0
        if floor > known and not self._agent.settling.is_over:
            return  # it is applied then
        if ledger is not None or floor:
            self._agent.home.about(key, FloorChanged(key, floor))

    def prefetch(self, apps: Iterable[App]) -> None:
        """Have the images of apps here before a session wants them: each once."""
        here = self._agent.config.node.datacenter
        images = {
            image: source for app in apps if app.allows(here) for image, source in app.images()
        }
        for image, source in images.items():
            self._agent.tasks.start(f"image {image[:19]}", self.prepare_image(image, source))

    async def prepare_image(self, digest: str, source: str = "") -> None:
        try:
            await self._agent.images.prepare(digest, source)
        except TabaneError as error:
            log.warning("image %s is not ready ahead of need: %s", digest[:19], error)


def _cohort_of(app: App | None, cohort: AppName) -> App | None:
    cohorts = app.cohorts() if app is not None else ()
    return next((one for one in cohorts if one.cohort == cohort), None)
