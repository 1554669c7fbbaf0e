"""What collectors told, joined to the processes it is about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from tabane.k2i.collectors.api import Facts
from tabane.k2i.collectors.runner import FactRow
from tabane.k2i.table import Process
from tabane.model import Instance


class ProcessWithFacts(Process, frozen=True, gc=False, kw_only=True):
    """`facts` by collector. What is known of an instance stands at its first process."""

    facts: dict[str, Facts]


def add_facts(
    processes: Iterable[Process], rows: Iterable[FactRow], instances: Sequence[Instance]
) -> list[ProcessWithFacts]:
    """The same processes, with what `rows` tell of each. Facts of a node are nobody's."""
    first: dict[str, int] = {instance.id: instance.pid for instance in instances}
    told: defaultdict[tuple[int, int, str], dict[str, Facts]] = defaultdict(dict)
    for row in rows:
        if row.of == "process":
            told[row.pid, row.start_ticks, ""][row.collector] = row.facts
        elif row.of == "instance" and first.get(row.instance):
            told[first[row.instance], 0, row.instance][row.collector] = row.facts
    return [_join(process, told) for process in processes]


def _join(process: Process, told: dict[tuple[int, int, str], dict[str, Facts]]) -> ProcessWithFacts:
    facts: dict[str, Facts] = {}
    if not process.inside:
        facts |= told.get((process.pid, 0, process.instance), {}) if process.instance else {}
        facts |= told.get((process.pid, process.start_ticks, ""), {})
    return ProcessWithFacts(**msgspec.structs.asdict(process), facts=facts)
