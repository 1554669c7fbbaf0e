"""`tabane df`: how full the file systems of each node are."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tabane.errors import UsageError
from tabane.tools.cli.asking import add_filters, ask, filters_of, say_partial
from tabane.tools.cli.common import Parser, Row, complain, print_json
from tabane.tools.cli.screen import RED, Place, layout, show
from tabane.tools.cli.sizes import IEC, SI, parse_unit, rounded_up

REMOTE = ("nfs", "cifs", "smb", "ceph", "9p", "glusterfs", "lustre", "afs", "sshfs", "fuse.sshfs")
FULL_PERCENT = 90


def df(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if relative := [file for file in args.files if not file.startswith("/")]:
        raise UsageError(
            f"df: {relative[0]!r}: write the whole path, which every node is asked for"
        )
    style = style_of(args)
    from tabane.tools.client import Cluster

    params = {"file": "\0".join(args.files)} if args.files else {}
    answer = ask(Cluster(args.root), "mounts", filters_of(args), params)
    rows = choose(answer.rows, args)
    found = [row for row in rows if row["mount_point"]]
    if args.json:
        print_json({"mounts": rows, "silent": answer.silent})
    elif found or not args.files:
        _show(found, style, args)
    problems = [*problems_of(rows), *_unfound(answer.rows, args.files)]
    if args.files and not found and not problems:
        problems = [f"df: no node has a file system for {', '.join(args.files)}"]
    for problem in problems:
        complain(problem)
    return say_partial(answer) | bool(problems)


def problems_of(rows: Iterable[Row]) -> list[str]:
    """What of them could not be found out."""
    return [
        f"{row['dc']}/{row['node']}: {row['mount_point'] or row['file']}: {row['problem']}"
        for row in rows
        if row["problem"] and not row["hidden"]
    ]


def _unfound(rows: Sequence[Row], files: Sequence[str]) -> Iterable[str]:
    """The files that no node has. One that some node has need not be on all."""
    found = {row["file"] for row in rows if not row["hidden"]}
    missing = [row for row in rows if row["file"] not in found] if files else ()
    return dict.fromkeys(f"df: {row['file']}: {row['problem']}" for row in missing)


def _parser() -> Parser:
    parser = Parser("df", "How full the file systems of each node are.", h_is_help=False)
    add = parser.add_argument
    add("-a", "--all", action="store_true", help="also those without size, and each again")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("-h", "--human-readable", dest="human", action="store_const", const=IEC)
    sizes.add_argument("-H", "--si", dest="human", action="store_const", const=SI)
    sizes.add_argument("-B", "--block-size", dest="unit", metavar="SIZE", help="as M, 4K or MB")
    sizes.add_argument(
        "-k", dest="unit", action="store_const", const="1K", help="in KiB, as always"
    )
    sizes.add_argument("-m", dest="unit", action="store_const", const="1M", help="in MiB")
    add("-i", "--inodes", action="store_true", help="inodes instead of sizes")
    add("-l", "--local", action="store_true", help="without those of other machines")
    add("-P", "--portability", action="store_true", help="the headings of POSIX")
    add("-T", "--print-type", dest="with_type", action="store_true", help="types too")
    add("-t", "--type", dest="types", action="append", metavar="TYPE", help="only of this type")
    add("-x", "--exclude-type", dest="without", action="append", metavar="TYPE")
    add("--total", action="store_true", help="the sum of each node, too")
    add_filters(parser, app=False, user=False)
    add("--json", action="store_true")
    add("files", nargs="*", metavar="FILE", help="only the file systems where these are")
    return parser


class Style(NamedTuple):
    """The four columns of figures."""

    headings: tuple[str, str, str, str]
    fields: tuple[str, str, str]
    write: Callable[[int], str]
    of_inodes: bool


def style_of(args: argparse.Namespace) -> Style:
    """Raises `UsageError` for a unit that is none."""
    human: int | None = args.human
    if args.inodes:
        write = (lambda n: rounded_up(n, base=human)) if human else str
        headings = ("Inodes", "IUsed", "IFree", "IUse%")
        return Style(headings, ("inodes", "inodes_used", "inodes_free"), write, True)
    fields = ("size_kib", "used_kib", "available_kib")
    percent = "Capacity" if args.portability else "Use%"
    if human:
        return Style(
            ("Size", "Used", "Avail", percent),
            fields,
            lambda kib: rounded_up(kib << 10, base=human),
            False,
        )
    unit = parse_unit(args.unit or "1K")
    name = "1024" if args.portability and unit == IEC else args.unit or "1K"
    suffix = "" if name[0].isdigit() else name
    name = f"1{name}" if not name[0].isdigit() else name
    headings = (f"{name}-blocks", "Used", "Available", percent)
    return Style(headings, fields, lambda kib: f"{-(-(kib << 10) // unit)}{suffix}", False)


def choose(rows: Iterable[Row], args: argparse.Namespace) -> list[Row]:
    """The mounts to show: of each file system one, and none that has no size or cannot be got to,
    unless -a, or for each file that is named the one that it lies on."""
    rows = [row for row in rows if not row["type"] or _is_of_type(row["type"], args)]
    if args.all or args.files:
        return rows
    return _one_of_each([row for row in rows if row["size_kib"] != 0 and not row["hidden"]])


def _is_of_type(name: str, args: argparse.Namespace) -> bool:
    wanted = not args.types or name in args.types
    return (
        wanted and name not in (args.without or ()) and not (args.local and name.startswith(REMOTE))
    )


def _one_of_each(rows: Sequence[Row]) -> list[Row]:
    """Of several mounts of a file system the one nearest to the root, in the place of the first;
    none that another mount at the same place hides."""
    on_top = {(row["dc"], row["node"], row["mount_point"]): id(row) for row in rows}
    shown = set(on_top.values())
    rows = [row for row in rows if id(row) in shown]
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = (row["dc"], row["node"], row["device_id"])
        if key not in best or len(row["mount_point"]) < len(best[key]["mount_point"]):
            best[key] = row
    return list(best.values())


def _show(rows: Sequence[Row], style: Style, args: argparse.Namespace) -> None:
    lines = render(rows, style, with_type=args.with_type, total=args.total)
    percents = [percent_of(row, style) or 0 for row in rows]
    show(lines, colours={n: RED for n, found in enumerate(percents, 1) if found >= FULL_PERCENT})


def render(
    rows: Sequence[Row], style: Style, *, with_type: bool = False, total: bool = False
) -> list[str]:
    """A line for each mount, then perhaps one for each node."""
    places = [Place("DC"), Place("NODE"), Place("Filesystem")]
    places += [Place("Type")] if with_type else []
    places += [Place(heading, right=True) for heading in style.headings]
    places.append(Place("Mounted on"))
    shown = [*rows, *(_totals(rows) if total else ())]
    cells = []
    for row in shown:
        percent = percent_of(row, style)
        numbers = [_or_dash(row[field], style.write) for field in style.fields]
        cells.append(
            [
                *(row["dc"], row["node"], row["device"]),
                *([row["type"]] if with_type else []),
                *numbers,
                "-" if percent is None else f"{percent}%",
                row["mount_point"],
            ]
        )
    return layout(places, cells)


def _or_dash(value: int | None, write: Callable[[int], str]) -> str:
    return "-" if value is None else write(value)


def percent_of(row: Row, style: Style) -> int | None:
    """Rounded up; None when there is nothing to have a part of."""
    if not style.of_inodes:
        known: int | None = row["used_percent"]
        return known if row["size_kib"] else None
    return -(-100 * row["inodes_used"] // row["inodes"]) if row["inodes"] else None


def _totals(rows: Sequence[Row]) -> list[Row]:
    sums: dict[tuple[str, str], Row] = {}
    names = ("size_kib", "used_kib", "available_kib", "inodes", "inodes_used", "inodes_free")
    for row in rows:
        into = sums.setdefault((row["dc"], row["node"]), dict.fromkeys(names, 0))
        for name in names:
            into[name] += row[name] or 0
    found = []
    for (dc, node), into in sums.items():
        usable = into["used_kib"] + into["available_kib"]
        percent = -(-100 * into["used_kib"] // usable) if usable else 0
        place = {"dc": dc, "node": node, "device": "total", "type": "-", "mount_point": "-"}
        found.append({**place, **into, "used_percent": percent})
    return found
