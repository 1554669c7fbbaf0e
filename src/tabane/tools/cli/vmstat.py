"""`tabane vmstat`: processes, memory, swapping, disks, interrupts and CPUs of each node.

The first report is of the time since each machine's start, the later ones of the time since the one
before, by the machine's own clock.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tabane.errors import UsageError
from tabane.tools.cli.asking import Answer, add_filters, ask, filters_of, say_partial
from tabane.tools.cli.columns import PAGE_KIB
from tabane.tools.cli.common import Parser, Row, pad, print_json, printable, whole
from tabane.tools.cli.repeating import every, seconds
from tabane.tools.cli.screen import BOLD, show

FIELDS = "dc,node,boot_id,uptime_s,booted_at,procs_running,procs_blocked,memory,vmstat,cpu"
FIELDS += ",interrupts,context_switches,forks"
UNITS = {"k": 1000, "K": 1024, "m": 1_000_000, "M": 1 << 20}
TICKS_PER_S = 100
SCREENFUL = 20
TITLED = {0: BOLD, 1: BOLD}
TITLE = "procs -----------memory---------- ---swap-- -----io---- -system-- ------cpu-----"
HEADING = " r  b   swpd   free {:>6} {:>6}   si   so    bi    bo   in   cs us sy id wa st"
LINE = "{:2} {:2} {:6} {:6} {:6} {:6} {:4} {:4} {:5} {:5} {:4} {:4} {:2} {:2} {:2} {:2} {:2}"


def vmstat(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    if args.delay is None and args.count is not None:
        raise UsageError("vmstat: a count needs a delay before it")
    from tabane.tools.client import Cluster

    cluster, filters = Cluster(args.root), filters_of(args)
    count = args.count or (None if args.delay else 1)
    before: dict[tuple[str, str], Row] = {}
    written, code = 0, 0
    for _ in every(args.delay or 1.0, count):
        answer = ask(cluster, "host", filters, {"fields": FIELDS})
        with_heading = not written or (written >= SCREENFUL and not args.one_header)
        written = _report(answer, before, args, with_heading) + (0 if with_heading else written)
        code |= say_partial(answer)
        before = {(row["dc"], row["node"]): row for row in answer.rows}
        if args.stats:
            break
    return code


def _parser() -> Parser:
    parser = Parser("vmstat", "Processes, memory, swapping, disks and CPUs of each node.")
    add = parser.add_argument
    add("-a", "--active", action="store_true", help="active and inactive memory")
    add("-s", "--stats", action="store_true", help="counters since the start, one a line")
    add("-S", "--unit", choices=tuple(UNITS), default="K", help="k: 1000, K: 1024, m, M bytes")
    add("-n", "--one-header", action="store_true", help="headings only once")
    add("-w", "--wide", action="store_true", help="accepted: columns are as wide as they must be")
    add_filters(parser, app=False, user=False)
    add("--json", action="store_true")
    add("delay", nargs="?", type=seconds, metavar="DELAY", help="seconds between reports")
    add("count", nargs="?", type=whole(1), metavar="COUNT", help="of reports, else without end")
    return parser


def _report(
    answer: Answer, before: dict[tuple[str, str], Row], args: argparse.Namespace, heading: bool
) -> int:
    """Print one; how many lines of figures it has."""
    if args.json:
        print_json({"host": answer.rows, "silent": answer.silent})
    elif args.stats:
        print("\n".join(line for row in answer.rows for line in counters(row, UNITS[args.unit])))
    else:
        lines = render(answer.rows, before, args.unit, active=args.active)
        show(lines if heading else lines[2:], heading=heading, colours=TITLED if heading else {})
    sys.stdout.flush()
    return len(answer.rows)


def render(
    rows: Sequence[Row], before: dict[tuple[str, str], Row], unit: str, *, active: bool = False
) -> list[str]:
    """Two lines of headings, and one for each node."""
    dc = max(len("DC"), *(len(row["dc"]) for row in rows)) if rows else 2
    node = max(len("NODE"), *(len(row["node"]) for row in rows)) if rows else 4
    names = ("inact", "active") if active else ("buff", "cache")
    lines = [" " * (dc + node + 2) + TITLE]
    lines.append(f"{'DC':{dc}} {'NODE':{node}} {HEADING.format(*names)}")
    for row in rows:
        place = f"{pad(printable(row['dc']), dc, False)} {pad(printable(row['node']), node, False)}"
        numbers = figures(row, before.get((row["dc"], row["node"])), UNITS[unit], active=active)
        lines.append(f"{place} {LINE.format(*numbers)}")
    return lines


def figures(row: Row, before: Row | None, unit: int, *, active: bool) -> list[int]:
    """A node's line. A machine that was started anew meanwhile has none before."""
    if before is not None and before["boot_id"] != row["boot_id"]:
        before = None
    span_s = row["uptime_s"] - before["uptime_s"] if before else row["uptime_s"]
    memory = row["memory"]
    names = ("inactive", "active") if active else ("buffers", "cache")
    kibs = [memory[f"{name}_kib"] for name in ("swap_used", "free", *names)]

    def rate(section: str | None, name: str, scale: float = 1.0) -> int:
        now = row[section] if section else row
        then = (before[section] if section else before) if before else {}
        grown = now.get(name, 0) - (then or {}).get(name, 0)
        return round(max(0, grown) * scale / span_s) if span_s > 0 else 0

    return [
        row["procs_running"],
        row["procs_blocked"],
        *((kib << 10) // unit for kib in kibs),
        *(rate("vmstat", name, PAGE_KIB * 1024 / unit) for name in ("pswpin", "pswpout")),
        *(rate("vmstat", name) for name in ("pgpgin", "pgpgout")),
        *(rate(None, name) for name in ("interrupts", "context_switches")),
        *cpu_shares(row["cpu"], before["cpu"] if before else None),
    ]


def cpu_shares(cpu: dict[str, float], before: dict[str, float] | None) -> list[int]:
    """User, system, idle, waiting and stolen, in percent."""

    def spent(*names: str) -> float:
        return sum(max(0.0, cpu[f"{n}_s"] - (before[f"{n}_s"] if before else 0.0)) for n in names)

    parts = [
        spent("user", "nice"),
        spent("system", "irq", "softirq"),
        spent("idle"),
        spent("iowait"),
        spent("steal"),
    ]
    whole_s = sum(parts) or 1.0
    return [int(100 * part / whole_s + 0.5) for part in parts]


def counters(row: Row, unit: int) -> list[str]:
    """As `vmstat -s`, each line after its node."""
    memory, cpu, pages = row["memory"], row["cpu"], row["vmstat"]
    name = next(letter for letter, size in UNITS.items() if size == unit)
    sized = [
        *((memory[f"{field}_kib"], text) for field, text in MEMORY_LINES),
    ]
    lines = [f"{(kib << 10) // unit:13} {name} {text}" for kib, text in sized]
    lines += [f"{round(cpu[f'{k}_s'] * TICKS_PER_S):13} {text} cpu ticks" for k, text in CPU_LINES]
    lines += [f"{pages.get(key, 0):13} {text}" for key, text in PAGE_LINES]
    lines.append(f"{row['interrupts']:13} interrupts")
    lines.append(f"{row['context_switches']:13} CPU context switches")
    lines.append(f"{round(row['booted_at']):13} boot time")
    lines.append(f"{row['forks']:13} forks")
    return [f"{printable(row['dc'])} {printable(row['node'])} {line}" for line in lines]


MEMORY_LINES = (
    ("total", "total memory"),
    ("used", "used memory"),
    ("active", "active memory"),
    ("inactive", "inactive memory"),
    ("free", "free memory"),
    ("buffers", "buffer memory"),
    ("cache", "swap cache"),
    ("swap_total", "total swap"),
    ("swap_used", "used swap"),
    ("swap_free", "free swap"),
)
CPU_LINES = (
    ("user", "non-nice user"),
    ("nice", "nice user"),
    ("system", "system"),
    ("idle", "idle"),
    ("iowait", "IO-wait"),
    ("irq", "IRQ"),
    ("softirq", "softirq"),
    ("steal", "stolen"),
    ("guest", "non-nice guest"),
    ("guest_nice", "nice guest"),
)
PAGE_LINES = (
    ("pgpgin", "K paged in"),
    ("pgpgout", "K paged out"),
    ("pswpin", "pages swapped in"),
    ("pswpout", "pages swapped out"),
)
