"""`tabane image`: the images of all nodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tabane.clock import SYSTEM
from tabane.errors import NotFound, ProtocolError, TabaneError, Unreachable, UsageError
from tabane.tools.cli.common import (
    Parser,
    Row,
    complain,
    format_age,
    print_json,
    print_table,
    say,
    say_silent,
)
from tabane.tools.cli.keeping import (
    LEAST_DIGITS,
    REMOVE_TIMEOUT_S,
    ask,
    collect,
    digits,
    say_removed,
)
from tabane.tools.cli.places import placed, short
from tabane.tools.cli.progress import Tell, shown
from tabane.tools.cli.sizes import scaled
from tabane.tools.client import Cluster, error_of

if TYPE_CHECKING:
    import argparse

    from tabane.images import Packed

ACTIONS: dict[str, tuple[str, frozenset[str]]] = {
    "ls": ("", frozenset({"node"})),
    "pull": ("docker://HOST/REPOSITORY:TAG", frozenset({"node", "all", "authfile"})),
    "push": ("IMAGE docker://HOST/REPOSITORY:TAG", frozenset({"authfile"})),
    "import": ("rootfs:DIR|oci:DIR|archive:FILE|wasm:FILE|solo5:FILE", frozenset({"node"})),
    "inspect": ("IMAGE", frozenset({"node"})),
    "rm": ("IMAGE...", frozenset({"node"})),
    "gc": ("", frozenset({"node", "dry_run"})),
}
"""What each takes: its words, and which options."""
PATH = "/api/v1/images"
KINDS = ("images", "stores")
SHOWN_NODES = 2


def image(argv: list[str]) -> int:
    parser = Parser("image", "Images: what nodes have, bringing them, and removing them.")
    forms = [f"{name} {words}".strip() for name, (words, _) in ACTIONS.items()]
    parser.usage = "tabane image " + "\n       tabane image ".join(forms)
    parser.add_argument("--node", metavar="NODE", help="only this node; not of push")
    parser.add_argument("--all", action="store_true", help="pull: to all nodes")
    parser.add_argument("--authfile", metavar="FILE", help="logins of registries, for this once")
    parser.add_argument("-n", "--dry-run", action="store_true", help="gc: only say what it is")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("action", choices=tuple(ACTIONS))
    parser.add_argument("words", nargs="*", metavar="IMAGE")
    args = parser.parse_args(argv)
    _check(args)
    actions: dict[str, Callable[[Cluster, argparse.Namespace], int]] = {
        "ls": _ls,
        "pull": _pull,
        "push": _push,
        "import": _import,
        "inspect": _inspect,
        "rm": _rm,
        "gc": _gc,
    }
    return actions[args.action](Cluster(args.root), args)


def _check(args: argparse.Namespace) -> None:
    words, allowed = ACTIONS[args.action]
    for option in ("node", "all", "authfile", "dry_run"):
        if getattr(args, option) and option not in allowed:
            raise UsageError(f"{args.action} has no option --{option.replace('_', '-')}")
    count, wanted = len(args.words), len(words.split())
    if count < wanted or (count > wanted and not words.endswith("...")):
        raise UsageError(f"write: tabane image {args.action} {words}".rstrip())
    if args.node and args.all:
        raise UsageError("give --node or --all, not both")


# What there is


def _ls(cluster: Cluster, args: argparse.Namespace) -> int:
    answer = ask(cluster, PATH, KINDS, args.node)
    if args.json:
        told = {kind: [*map(placed, answer[kind])] for kind in KINDS}
        print_json({**told, "silent": answer["silent"]})
        return say_silent(answer["silent"])
    rows = [_summary(rows) for rows in _by_digest(answer["images"]).values()]
    headings = ("DIGEST", "KIND", "SIZE", "UNPACKED", "NODES", "APPS", "USED", "SOURCE")
    print_table(headings, rows)
    print()
    stores = [
        (store["node"], f"{scaled(store['used_bytes'])}", f"{scaled(store['limit_bytes'])}")
        for store in answer["stores"]
    ]
    print_table(("NODE", "USED", "QUOTA"), stores)
    return say_silent(answer["silent"])


def _by_digest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["digest"], []).append(row)
    return found


def _summary(rows: list[Row]) -> tuple[object, ...]:
    nodes = [row["node"].partition("/")[2] for row in rows]
    more = f",+{len(nodes) - SHOWN_NODES}" if len(nodes) > SHOWN_NODES else ""
    used_at = max(row["used_at"] for row in rows)
    sources = _sources(rows)
    others = f" (+{len(sources) - 1})" if len(sources) > 1 else ""
    return (
        digits(rows[0]["digest"]),
        rows[0]["kind"],
        scaled(rows[0]["bytes"]),
        scaled(max(row["unpacked_bytes"] for row in rows)),
        ",".join(nodes[:SHOWN_NODES]) + more,
        ",".join(map(short, rows[0]["apps"])) or "-",
        format_age(SYSTEM.wall() - used_at),
        sources[0] + others if sources else "-",
    )


def _sources(rows: list[Row]) -> list[str]:
    """All names of an image, each once."""
    return list(dict.fromkeys(source for row in rows for source in row["sources"]))


def find(rows: Iterable[Row], name: str) -> list[Row]:
    """The rows of one image: by its digest or the beginning of it, or by where it came from. Raises
    `NotFound`, and `UsageError` for what several are meant by."""
    groups = _by_digest(rows)
    start = name.removeprefix("sha256:")
    by_digest = len(start) >= LEAST_DIGITS
    are_digits = start and set(start) <= set("0123456789abcdef")
    found = {
        digest: group
        for digest, group in groups.items()
        if (by_digest and digest.removeprefix("sha256:").startswith(start))
        or not {name, f"docker://{name}"}.isdisjoint(_sources(group))
    }
    if not found and are_digits and not by_digest:
        raise UsageError(f"{name!r}: write {LEAST_DIGITS} digits or more of an image's digest")
    if not found:
        raise NotFound(f"no node has an image {name!r}: look with `tabane image ls`")
    if len(found) > 1:
        several = ", ".join(map(digits, found))
        raise UsageError(f"{name!r} means several images: write more of one of {several}")
    return found.popitem()[1]


def _inspect(cluster: Cluster, args: argparse.Namespace) -> int:
    row = find(ask(cluster, PATH, KINDS, args.node)["images"], args.words[0])[0]
    path = f"/api/v1/images/{row['digest']}/description"
    print_json(placed(cluster.get(path, node=row["node"])))
    return 0


# Coming


def _pull(cluster: Cluster, args: argparse.Namespace) -> int:
    wanted = {"source": args.words[0], "auth": read_auth(args.authfile)}
    nodes = cluster.nodes if args.all else [args.node]
    brought: list[Row] = []
    problems = 0
    with shown(quiet=args.json) as tell:
        for node in nodes:
            try:
                brought.append(follow(cluster, "pull", wanted, tell, node=node))
            except TabaneError as error:
                if not args.all or not isinstance(error, Unreachable):
                    raise
                complain(f"image: {error.message}")
                problems += 1
            else:
                wanted["digest"] = brought[0]["digest"]
    _say_brought(brought, args)
    return 1 if problems else 0


def _say_brought(brought: list[Row], args: argparse.Namespace) -> None:
    if args.json:
        print_json({"images": [*map(placed, brought)]})
    for row in () if args.json else brought:
        say(f"{row['digest']} is on {row['node']} ({scaled(row['bytes'])}B, {row['kind']})")


def _push(cluster: Cluster, args: argparse.Namespace) -> int:
    name, target = args.words
    row = find(ask(cluster, PATH, KINDS, None)["images"], name)[0]
    body = {"digest": row["digest"], "target": target, "auth": read_auth(args.authfile)}
    with shown(quiet=args.json) as tell:
        pushed = follow(cluster, "push", body, tell, node=row["node"])
    print_json(placed(pushed)) if args.json else say(f"{row['digest']} is {pushed['target']}")
    return 0


def _import(cluster: Cluster, args: argparse.Namespace) -> int:
    from tabane.images import pack

    with pack(args.words[0], Path.cwd()) as packed, shown(quiet=args.json) as tell:
        row = send(cluster, packed, args.words[0], tell, node=args.node)
    _say_brought([row], args)
    return 0


def send(
    cluster: Cluster, packed: Packed, source: str, tell: Tell, *, node: str | None = None
) -> Row:
    """Have an image on a node that is packed here; nothing is sent when it is there already."""
    from urllib.parse import quote

    try:
        row: Row = cluster.get(f"/api/v1/images/{packed.digest}/description", node=node)
        return row
    except NotFound:
        pass

    def chunks() -> Iterator[bytes]:
        done = 0
        for chunk in packed.chunks():
            yield chunk
            done = min(packed.bytes, done + len(chunk))
            told = {"step": "send", "where": node or "a node"}
            tell(told | {"done_bytes": done, "total_bytes": packed.bytes})

    path = f"/api/v1/images?size={packed.bytes}&source={quote(source, safe='')}"
    sent: Row = json.loads(cluster.request("POST", path, chunks(), node=node))
    return sent


def follow(
    cluster: Cluster, action: str, body: dict[str, str], tell: Tell, *, node: str | None = None
) -> Row:
    """Have a node `pull` or `push`, and hear how far it is. Returns the image; raises what went
    wrong."""
    with cluster.stream(f"/api/v1/images/{action}", node=node, body=body) as lines:
        for line in lines:
            told: Row = json.loads(line)
            if "error" in told:
                raise error_of(0, line)
            if "step" not in told:
                return told
            tell(told)
    raise ProtocolError(f"a node ended its answer before it was done: {action} again")


def read_auth(file: str | None) -> str:
    """Logins, as `skopeo login --authfile` writes them. Raises `UsageError`."""
    if file is None:
        return ""
    try:
        text = Path(file).read_text()
        if isinstance(json.loads(text).get("auths"), dict):
            return text
    except OSError as error:
        raise UsageError(f"--authfile: {file}: {error.strerror}") from None
    except (ValueError, AttributeError):
        pass
    raise UsageError(f"--authfile: {file} is none: `skopeo login --authfile {file}` writes one")


# Going


def _rm(cluster: Cluster, args: argparse.Namespace) -> int:
    rows = ask(cluster, PATH, KINDS, args.node)["images"]
    digests = [find(rows, name)[0]["digest"] for name in args.words]
    node = f"?node={rows[0]['node']}" if args.node else ""
    removed: list[Row] = []
    silent: set[str] = set()
    for digest in dict.fromkeys(digests):
        path = f"/api/v1/images/{digest}{node}"
        data = cluster.request("DELETE", path, timeout_s=REMOVE_TIMEOUT_S)
        answer = json.loads(data)
        removed += answer["removed"]
        silent |= {*answer["silent"]}
    return say_removed("image", removed, sorted(silent), "removed", as_json=args.json)


def _gc(cluster: Cluster, args: argparse.Namespace) -> int:
    answer = collect(cluster, "/api/v1/images/gc", args.node, dry_run=args.dry_run)
    done = "would be removed" if args.dry_run else "removed"
    removed, silent = answer["removed"], answer["silent"]
    stays = "what an app names or an instance runs from, or was asked for in the last minute,"
    return say_removed("image", removed, silent, done, as_json=args.json, stays=stays)
