"""`tabane members`, `tabane doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tabane.errors import NotFound, Unreachable
from tabane.tools.cli.common import Parser, Row, print_json, print_table, say, say_silent
from tabane.tools.cli.places import place_of, placed
from tabane.tools.client import Cluster


def members(argv: list[str]) -> int:
    parser = Parser("members", "Nodes and their hubs.")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = Cluster(args.root).get("/api/v1/members")
    if args.json:
        print_json({**answer, "members": [*map(placed, answer["members"])]})
        return say_silent(answer["silent"])
    headings = ("DC", "NODE", "GATEWAY", "HUB", "STORE", "DRIVERS", "INSTANCES")
    rows = [
        (
            *place_of(row),
            row["gateway"],
            "here" if row["asked"] else "linked" if row["linked"] else "no link",
            "control" if row["control"] else _replica(row.get("behind")),
            ",".join(row["drivers"]) or "-",
            "-" if row["instances"] is None else row["instances"],
        )
        for row in answer["members"]
    ]
    print_table(headings, rows)
    return say_silent(answer["silent"])


def _replica(behind: int | None) -> str:
    return f"replica, {behind} behind" if behind else "replica"


def _ask_doctor(root: Path | None, node: str | None) -> dict[str, Any]:
    """A node's answer; of this machine itself when no cluster runs."""
    try:
        answer: dict[str, Any] = Cluster(root).get("/api/v1/doctor", node=node)
        return answer
    except (NotFound, Unreachable):
        if node is not None:
            raise
    from tabane.tools.probing import probe_machine

    return probe_machine()


def doctor(argv: list[str]) -> int:
    parser = Parser("doctor", "Which drivers work, how they enforce the defaults, what is missing.")
    parser.add_argument("--node", help="ask this node; else the first that answers")
    parser.add_argument("-v", "--verbose", action="store_true", help="how each enforces them, too")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    answer = _ask_doctor(args.root, args.node)
    if args.json:
        print_json(placed(answer))
        return 0
    say(f"node {answer['node']}" if answer["node"] else "this machine (no cluster runs)")
    for sentence in answer.get("lacks", ()):
        say(f"a local cluster cannot run here: {sentence}")
    print_table(("DRIVER", "CLASS", "WORKS", "REASON"), map(_driver_row, answer["drivers"]))
    for driver in answer["drivers"] if args.verbose else ():
        print()
        say(f"{driver['driver']}: {driver['detail'] or driver['reason']}")
        rows = [
            (d["default"], "enforced" if d["enforced"] else "no", d["how"])
            for d in driver["defaults"]
        ]
        print_table(("DEFAULT", "", "HOW"), rows)
    if not args.verbose:
        say("-v tells how each enforces the security defaults")
    return 0


def _driver_row(driver: Row) -> tuple[object, ...]:
    works = "emulated" if driver["emulated"] else "yes" if driver["works"] else "no"
    return driver["driver"], driver["class"], works, driver["reason"]
