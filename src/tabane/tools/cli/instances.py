"""`tabane stop`, `logs`, `exec`.

What a program writes is its user's: `logs` and `exec` pass it on as it is, colours and control
characters too. Only a terminal gets a log with escapes for what is no text: whoever made the app
write it is not who reads it. With --json it is escaped, too.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from typing import Any

from tabane.errors import NotFound, TabaneError, Unreachable, UsageError
from tabane.node.logfile import parse_line
from tabane.tools.cli.common import (
    NAME,
    Parser,
    app_key,
    complain,
    print_json,
    printable,
    say,
    whole,
)
from tabane.tools.client import Cluster

USER_HELP = "NAME[:GROUP] or UID[:GID] of the image; else as the program itself"
SHORTEST_ID = 4
"""Of an instance's id, what may stand for it, if no other begins like that."""
STDIN_BLOCK = 64 << 10
LONGEST_EXEC_S = 3600.0
ANSWER_MARGIN_S = 10.0
"""What a node may take beyond the time the command has, to kill it and say so."""


def stop(argv: list[str]) -> int:
    parser = Parser("stop", "Drain an instance and stop it; of an app: all its instances.")
    parser.add_argument("what", help="an instance id, or an app's name")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    found = _find(cluster, args.what)
    told = [instance for instance in found if _tell_to_stop(cluster, instance)]
    if args.json:
        print_json({"told": told})
    else:
        for instance in told:
            say(f"{instance['id']} on {instance['node']} is told to stop")
    return 0 if told == found else 1


def _tell_to_stop(cluster: Cluster, instance: dict[str, Any]) -> bool:
    try:
        cluster.post(f"/api/v1/instances/{instance['id']}/stop", node=instance["node"])
    except TabaneError as error:
        complain(error.message)
        return False
    return True


def logs(argv: list[str]) -> int:
    parser = Parser("logs", "What an instance wrote; also after its end, by its id.")
    parser.add_argument("what", help="an instance id, or an app's name")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    parser.add_argument("-n", "--tail", type=whole(1), metavar="N", help="the last N lines")
    parser.add_argument("-t", "--timestamps", action="store_true")
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args(argv)
    cluster = Cluster(args.root)
    found = _find(cluster, args.what, ended=True)
    if args.follow and len(found) > 1:
        raise UsageError(f"logs: -f follows one instance: choose one of {_ids(found)}")
    query = f"tail={args.tail or 0}&follow={str(args.follow).lower()}"
    for instance in found:
        path = f"/api/v1/instances/{instance['id']}/log?{query}"
        with cluster.stream(path, node=instance["node"]) as lines:
            for line in lines:
                _print_line(line, args)
    return 0


def _print_line(line: bytes, args: argparse.Namespace) -> None:
    parsed = parse_line(line)
    if parsed is None:
        return
    stamp, stream, is_whole, text = parsed
    if args.json:
        shown = {"at": stamp, "stream": stream, "text": _text(text), "whole": is_whole}
        print(json.dumps(shown), flush=True)
        return
    out = sys.stderr if stream == "stderr" else sys.stdout
    head = f"{stamp} ".encode() if args.timestamps else b""
    shown_text = _for_terminal(text) if out.isatty() else text
    out.buffer.write(head + shown_text + (b"\n" if is_whole else b""))
    out.flush()


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def _for_terminal(data: bytes) -> bytes:
    """With escapes for all but text and tabs: nothing in it moves the cursor."""
    return "\t".join(map(printable, _text(data).split("\t"))).encode()


def execute(argv: list[str]) -> int:
    args = _parse_exec(argv)
    cluster = Cluster(args.root)
    found = _find(cluster, args.instance)
    if len(found) > 1:
        raise UsageError(f"exec: {args.instance} has {len(found)} instances: {_ids(found)}")
    body = {"argv": args.command, "timeout_s": args.timeout}
    body |= {name: value for name in ("user", "workdir") if (value := getattr(args, name))}
    path = f"/api/v1/instances/{found[0]['id']}/exec"
    node, limit_s = found[0]["node"], args.timeout + ANSWER_MARGIN_S
    if (descriptor := _stdin()) is None:
        return _show_end(cluster.post(path, body, node=node, timeout_s=limit_s), args.json)
    blocks = iter(lambda: os.read(descriptor, STDIN_BLOCK), b"")
    answer = cluster.converse(f"{path}-stdin", body, blocks, node=node, timeout_s=limit_s)
    return _show_end(answer, args.json)


def _stdin() -> int | None:
    """What the command shall read: nothing from a terminal, or when there is none."""
    try:
        descriptor = sys.stdin.fileno()
        return None if os.isatty(descriptor) else descriptor
    except (AttributeError, OSError, ValueError):
        return None


globals()["exec"] = execute


def _parse_exec(argv: list[str]) -> argparse.Namespace:
    parser = Parser("exec", "Run a command inside an instance, and end as it ends.")
    parser.usage = "tabane exec [options] INSTANCE [--] COMMAND ..."
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS")
    parser.add_argument("-u", "--user", default="", metavar="USER", help=USER_HELP)
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="else the program's own")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("instance", help="an instance id, or the name of an app with one instance")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="all that follows the instance")
    args = parser.parse_args(argv)
    if args.command[:1] == ["--"]:
        args.command.pop(0)
    if not args.command:
        raise UsageError("exec: name the command, after the instance")
    if args.command[0].startswith("-"):
        option = args.command[0]
        raise UsageError(f"exec: {option!r} is no command: options go before the instance")
    return args


def _show_end(answer: dict[str, Any], as_json: bool) -> int:
    out, err = (base64.b64decode(answer[name]) for name in ("stdout", "stderr"))
    if as_json:
        print_json(answer | {"stdout": _text(out), "stderr": _text(err)})
    else:
        sys.stdout.buffer.write(out)
        sys.stderr.buffer.write(err)
        sys.stderr.flush()
    code: int = answer["code"]
    return code


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_EXEC_S:
        problem = f"{text!r} is not a number of seconds above 0, up to {LONGEST_EXEC_S:g}"
        raise argparse.ArgumentTypeError(problem)
    return seconds


def _ids(instances: list[dict[str, Any]]) -> str:
    return ", ".join(instance["id"] for instance in instances)


def _find(cluster: Cluster, what: str, *, ended: bool = False) -> list[dict[str, Any]]:
    """Instances by app, by id, or by an id's beginning; `ended`: also one of which only the log is
    left."""
    if not NAME.fullmatch(what):
        raise NotFound(f"{what!r} is neither an instance's id nor an app's name")
    answer = cluster.get("/api/v1/instances")
    found = _matching(answer["instances"], what)
    silent = answer["silent"]
    if not found and ended:
        found, silent = _find_ended(cluster, what)
    if not found and silent:
        raise Unreachable(f"{what} is not on the nodes that answered ({', '.join(silent)} did not)")
    if not found:
        raise NotFound(_explain_absence(cluster, what))
    return found


def _matching(instances: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """Raises `UsageError` when several ids begin like that."""
    whole = [i for i in instances if what == i["id"] or app_key(what) == i["app"]]
    begun = [i for i in instances if len(what) >= SHORTEST_ID and i["id"].startswith(what)]
    if not whole and len(begun) > 1:
        raise UsageError(f"{what} is the beginning of several: write more of {_ids(begun)}")
    return whole or begun


def _explain_absence(cluster: Cluster, what: str) -> str:
    try:
        cluster.get(f"/api/v1/apps/{app_key(what)}")
    except NotFound:
        return f"no instance is called {what}, and there is no app of that name"
    return f"the app {what} is at rest: no instance of it runs now"


def _find_ended(cluster: Cluster, what: str) -> tuple[list[dict[str, Any]], list[str]]:
    """From the events, which outlive the instances; and who did not tell theirs."""
    answer = cluster.get("/api/v1/events?limit=2000")
    ended = {event["instance"]: event | {"id": event["instance"]} for event in answer["records"]}
    return _matching(list(ended.values()), what)[-1:], answer["silent"]
