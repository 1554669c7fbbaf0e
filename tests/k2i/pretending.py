"""The k2i program, which takes everybody for root, takes every order, and obeys none."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from tabane.errors import Stale
from tabane.k2i import api, cli
from tabane.k2i.control_api import build_control_router
from tabane.k2i.orders import InstanceOrder, InstanceOutcome, Limit, Order, Outcome
from tabane.k2i.permission import check_action
from tabane.security.identity import Principal

ROOT = Principal("peer", 0)


class Obeyed:
    """Says that all was done, or for every second order, that nothing was."""

    def __init__(self) -> None:
        self.count = 0

    async def obey(self, order: Order, who: Principal) -> tuple[Outcome, ...]:
        check_action(order.action)
        self.count += 1
        if self.count % 2:
            return tuple(Outcome(target, "stale", "it is gone") for target in order.targets)
        after = {"core": Limit(0, -1)}
        return tuple(Outcome(target, before=5, after=after) for target in order.targets)

    async def obey_instance(self, order: InstanceOrder, who: Principal) -> InstanceOutcome:
        self.count += 1
        if self.count % 2:
            raise Stale("it is gone")
        return InstanceOutcome(order.target, {"cpu": 1.0}, {"cpu": 0.5})


def main() -> None:
    """The k2i program, which takes everybody for root, and obeys nobody."""
    api.ANYBODY = ROOT
    build = cli.build_app

    def build_app(*args: Any) -> FastAPI:
        app = build(*args)
        app.include_router(build_control_router(Obeyed()))
        return app

    cli.build_app = build_app
    cli.main()


if __name__ == "__main__":
    main()
