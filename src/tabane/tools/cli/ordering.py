"""What kill, pkill and renice share: whom a word means, and sending the order there.

Whoever is meant was seen a moment ago in the cluster's table. The order names the incarnation of
the node and the start time that were seen, so that the node refuses when another process has got
the pid meanwhile.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tabane.errors import (
    NotFound,
    TabaneError,
    TimedOut,
    Unreachable,
    Unsupported,
    UsageError,
)
from tabane.tools.cli.asking import Answer, Filters, check_place
from tabane.tools.cli.columns import gpid, short_app
from tabane.tools.cli.common import Row, complain
from tabane.tools.cli.finding import SHORTEST_ID

if TYPE_CHECKING:
    from tabane.tools.client import Cluster

SIGNAL = re.compile(r"-(?:[0-9]{1,3}|(?:SIG)?[A-Z][A-Z0-9+-]+)", re.IGNORECASE)
PID = re.compile("[0-9]{1,7}")
"""What is a pid, if anybody's, and never the beginning of an id: when the process that was meant
has ended, nobody else is."""
MOST_CANDIDATES = 8
MOST_COMPLAINTS = 5
"""Of one kind; more are only counted."""
ANSWER_S = 15.0
"""A node waits less for others that it passes an order on to."""
LOST = (Unreachable.code, TimedOut.code)
"""What keeps from knowing whether a target's order was obeyed."""
IDENTITY = ("dc", "node", "incarnation", "pid", "start_ticks")
"""What says which process, once and for all."""


def take_signal(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The first of `-9`, `-TERM`, `-SIGHUP` before `--`, without its dash, and the other words."""
    from tabane.k2i.orders import parse_signal

    for n, word in enumerate(argv):
        if word == "--":
            break
        if SIGNAL.fullmatch(word) and (n == 0 or argv[n - 1] not in ("-s", "--signal", "-n")):
            try:
                parse_signal(word[1:])
            except UsageError:
                continue
            return word[1:], [*argv[:n], *argv[n + 1 :]]
    return "", list(argv)


def find_target(word: str, answer: Answer, nodes: Sequence[str] = ()) -> Row:
    """The one process that is meant by `dc/node:pid`, a pid, or an instance's id, whose first
    process it is then. Raises `UsageError` when there are several, `NotFound` when there is none
    (nor its node among `nodes`), `Unsupported` for one inside of an instance, and `Unreachable`
    when a node that did not answer may have it."""
    if not word:
        raise UsageError("an empty word is no process: write DC/NODE:PID, PID, or an id")
    if PID.fullmatch(word):
        found = [row for row in answer.rows if str(row["pid"]) == word]
        return _only(word, found, answer)
    if ":" in word:
        found = [row for row in answer.rows if gpid(row) == word]
        node = word.partition(":")[0]
        if not found and nodes and node not in answer.silent:
            check_place(nodes, Filters(node=node))
        return _only(word, found, answer, word)
    return _first_of(word, answer)


def _only(word: str, seen: Sequence[Row], answer: Answer, place: str = "") -> Row:
    found = [row for row in seen if not row["inside"]]
    node = place.partition(":")[0]
    silent = [name for name in answer.silent if not node or name == node]
    if len(found) > 1:
        named = [f"{gpid(row)} ({row['name']})" for row in found[:MOST_CANDIDATES]]
        more = ", ..." if len(found) > MOST_CANDIDATES else ""
        raise UsageError(f"{word} is a process of several nodes: choose {', '.join(named)}{more}")
    if silent:
        names = ", ".join(silent)
        if found:
            hint = f"for this one write {gpid(found[0])} ({found[0]['name']})"
            raise Unreachable(f"{word} may be on {names} too, who did not answer: {hint}")
        raise Unreachable(f"{word} is not on the nodes that answered ({names} did not)")
    if not found and seen:
        raise Unsupported(f"{gpid(seen[0])}: {why_out_of_reach(seen[0])}")
    if not found:
        raise NotFound(f"no such process: {word}")
    return found[0]


def why_out_of_reach(row: Row) -> str:
    """What runs inside of an instance has a number of its own there, which its node must never be
    told for one of its."""
    instance = row["instance"]
    reach = f"`tabane exec {instance} kill {row['pid']}` does, if its image has a kill"
    return f"it runs inside of {instance}, where no signal from outside reaches it: {reach}"


def _first_of(word: str, answer: Answer) -> Row:
    """The first process of the instance with this id, or a beginning of it."""
    ids = {row["instance"] for row in answer.rows if row["instance"]}
    begun = {one for one in ids if len(word) >= SHORTEST_ID and one.startswith(word)}
    chosen = {word} & ids or begun
    if len(chosen) > 1:
        raise UsageError(f"{word} begins several ids: write more of {', '.join(sorted(chosen))}")
    if not chosen:
        raise _nobody(word, answer)
    rows = [row for row in answer.rows if row["instance"] in chosen and not row["inside"]]
    pids = {row["pid"] for row in rows}
    tops = [row for row in rows if row["ppid"] not in pids]
    return min(tops or rows, key=lambda row: (row["start_ticks"], row["pid"]))


def _nobody(word: str, answer: Answer) -> TabaneError:
    apps = {short_app(row) for row in answer.rows if row["app"]}
    if word in apps:
        hint = (
            f"`tabane pkill --app {word} NAME` signals its programs, `tabane stop {word}` ends it"
        )
        return UsageError(f"{word} is an app, not a process: {hint}")
    if answer.silent:
        names = ", ".join(answer.silent)
        return Unreachable(f"{word} is not on the nodes that answered ({names} did not)")
    return NotFound(f"{word} is no process and no instance: write DC/NODE:PID, PID, or an id")


def find_all(
    words: Sequence[str], find: Callable[[str], Row]
) -> tuple[list[Row], list[TabaneError]]:
    """Whom the words mean, each once, and what is wrong with the others."""
    found: dict[str, Row] = {}
    problems: list[TabaneError] = []
    for word in words:
        try:
            row = find(word)
        except TabaneError as error:
            problems.append(error)
        else:
            found[gpid(row)] = row
    return list(found.values()), problems


def send(
    cluster: Cluster, rows: Sequence[Row], action: str, body: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The outcome for each row, in their order; those inside of instances are refused here."""
    from tabane.k2i.orders import MAX_TARGETS

    targets = [{key: row[key] for key in IDENTITY} for row in rows if not row["inside"]]
    outcomes: list[dict[str, Any]] = []
    for n in range(0, len(targets), MAX_TARGETS):
        order = {"targets": targets[n : n + MAX_TARGETS], **body}
        outcomes += _send_once(cluster, f"/v2/processes/{action}", order)
    told = iter(outcomes)
    return [_refuse_inside(row) if row["inside"] else next(told) for row in rows]


def _send_once(cluster: Cluster, path: str, order: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Its effect is one, however often it is sent: nodes know it by its key, and only answer again
    when it is done. So it is sent again when an answer was lost, here or between the nodes."""
    order = {**order, "idempotency_key": os.urandom(16).hex()}
    try:
        outcomes = _deliver(cluster, path, order)
        if any(outcome.get("error") in LOST for outcome in outcomes):
            outcomes = _deliver(cluster, path, order)
    except Unreachable as error:  # what became of other orders is to be told all the same
        return [{"error": error.code, "message": error.message}] * len(order["targets"])
    return outcomes


def _deliver(cluster: Cluster, path: str, order: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Through the first node that answers; the first of all is tried again in the end. Raises
    `Unreachable` when none does."""
    problems: list[str] = []
    nodes = cluster.candidates()
    for node in (*nodes, nodes[0]):
        try:
            answer = cluster.post(path, order, node=node, timeout_s=ANSWER_S)
        except Unreachable as error:
            problems.append(error.message)
        else:
            outcomes: list[dict[str, Any]] = answer["outcomes"]
            return outcomes
    raise Unreachable(f"no node has confirmed it: {problems[0]}")


def _refuse_inside(row: Row) -> dict[str, Any]:
    return {"error": Unsupported.code, "message": why_out_of_reach(row)}


def complain_of(name: str, refused: Sequence[tuple[Row, Mapping[str, Any]]]) -> None:
    """On stderr, in the command's name, what became of those whose outcome is an error: some of
    each kind, and how many more. Most of what nodes say begins with the process already."""
    told: Counter[str] = Counter()
    for row, outcome in refused:
        told[outcome["error"]] += 1
        if told[outcome["error"]] <= MOST_COMPLAINTS:
            place, message = gpid(row), outcome["message"]
            told_of = message if message.startswith(place) else f"{place}: {message}"
            complain(f"{name}: {told_of}")
    for error, count in told.items():
        if count > MOST_COMPLAINTS:
            more = f"{count - MOST_COMPLAINTS} more in the same way"
            complain(f"{name}: {more}: {error.replace('_', ' ')}")
