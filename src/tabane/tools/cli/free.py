"""`tabane free`: memory of each node."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tabane.tools.cli.asking import add_filters, ask, filters_of, say_partial
from tabane.tools.cli.common import Parser, print_json, whole
from tabane.tools.cli.repeating import every, seconds
from tabane.tools.cli.screen import Place, layout, show
from tabane.tools.cli.sizes import IEC, LETTERS, SI, scaled

UNITS = [("bytes", "b", 1), ("kibi", "k", 1 << 10), ("mebi", "m", 1 << 20), ("gibi", "g", 1 << 30)]
UNITS += [("tebi", "", 1 << 40), ("pebi", "", 1 << 50)]
UNITS += [
    (name, "", SI ** (LETTERS.index(name[0].upper()) + 1))
    for name in ("kilo", "mega", "giga", "tera", "peta")
]
FIELDS = "dc,node,memory"


def free(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    from tabane.tools.client import Cluster

    cluster, filters = Cluster(args.root), filters_of(args)
    count = args.count or (None if args.seconds else 1)
    code = 0
    for n in every(args.seconds or 1.0, count):
        answer = ask(cluster, "host", filters, {"fields": FIELDS})
        if args.json:
            print_json({"host": answer.rows, "silent": answer.silent})
        else:
            show(["", *render(answer.rows, args)][0 if n else 1 :], heading=not n)
        sys.stdout.flush()
        code |= say_partial(answer)
    return code


def _parser() -> Parser:
    parser = Parser("free", "Free and used memory of each node.", h_is_help=False)
    parser.usage = "tabane free [-h | -b | -k | -m | -g | ...] [options]"
    units = parser.add_mutually_exclusive_group()
    for name, letter, unit in UNITS:
        options = [f"-{letter}"] if letter else []
        options.append(f"--{name}")
        units.add_argument(*options, dest="unit", action="store_const", const=unit)
    units.add_argument("-h", "--human", action="store_true", help="in whichever unit is short")
    add = parser.add_argument
    add("--si", action="store_true", help="with -h: powers of 1000, not of 1024")
    add("-w", "--wide", action="store_true", help="buffers and cache apart")
    add("-t", "--total", action="store_true", help="memory and swap together, too")
    add("-l", "--lohi", action="store_true", help="low and high memory, too")
    add("-v", "--committed", action="store_true", help="what is promised, too")
    add("-s", "--seconds", type=seconds, metavar="SECONDS", help="again, so often")
    add("-c", "--count", type=whole(1), metavar="N", help="so many times, else once")
    add_filters(parser, app=False, user=False)
    add("--json", action="store_true")
    return parser


def render(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    cached = ["buffers", "cache"] if args.wide else ["buff/cache"]
    headings = ["total", "used", "free", "shared", *cached, "available"]
    places = [Place("DC"), Place("NODE"), Place("")]
    places += [Place(heading, right=True) for heading in headings]
    write = _writer(args)
    lines = []
    for row in rows:
        for name, numbers in _lines_of(row["memory"], args):
            texts = [write(number) for number in numbers] + [""] * (len(headings) - len(numbers))
            lines.append([row["dc"], row["node"], f"{name}:", *texts])
    return layout(places, lines)


def _writer(args: argparse.Namespace) -> Callable[[int], str]:
    if args.human:
        base = SI if args.si else IEC
        return lambda kib: scaled(kib << 10, base=base)
    unit = args.unit or (SI if args.si else IEC)
    return lambda kib: str((kib << 10) // unit)


def _lines_of(memory: dict[str, int], args: argparse.Namespace) -> list[tuple[str, list[int]]]:
    def of(*names: str) -> list[int]:
        return [memory[f"{name}_kib"] for name in names]

    cached = of("buffers", "cache")
    middle = cached if args.wide else [sum(cached)]
    total = of("total", "used", "free")
    swap = of("swap_total", "swap_used", "swap_free")
    lines = [("Mem", [*total, *of("shared"), *middle, *of("available")])]
    if args.lohi:
        for name in ("low", "high"):
            all_, unused = of(f"{name}_total", f"{name}_free")
            lines.append((name.capitalize(), [all_, all_ - unused, unused]))
    lines.append(("Swap", swap))
    if args.total:
        lines.append(("Total", [a + b for a, b in zip(total, swap, strict=True)]))
    if args.committed:
        limit, used = of("commit_limit", "committed")
        lines.append(("Comm", [limit, used, limit - used]))
    return lines
