"""The cluster's own /proc/stat, meminfo, vmstat, loadavg and uptime: sums over its machines.

Nodes that share a kernel (as those of a local cluster do) tell the same figures, so each kernel is
counted once. What is not in these five files is not the cluster's: all other host-wide files are
those of this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_NOT_SUMMED = (b"Hugepagesize", b"btime")


def sum_meminfo(files: Iterable[bytes]) -> bytes:
    """Lines as `MemTotal:  16384 kB`."""
    totals: dict[bytes, int] = {}
    units: dict[bytes, bytes] = {}
    for line in (line for file in files for line in file.splitlines()):
        name, _, rest = line.partition(b":")
        words = rest.split()
        if words:
            value = int(words[0])
            totals[name] = value if name in _NOT_SUMMED else totals.get(name, 0) + value
            units[name] = b" " + words[1] if len(words) > 1 else b""
    return b"".join(
        b"%-16b%8d%b\n" % (name + b":", value, units[name]) for name, value in totals.items()
    )


def sum_vmstat(files: Iterable[bytes]) -> bytes:
    """Lines as `pgfault 123`."""
    totals: dict[bytes, int] = {}
    for line in (line for file in files for line in file.splitlines()):
        name, _, value = line.partition(b" ")
        totals[name] = totals.get(name, 0) + int(value)
    return b"".join(b"%b %d\n" % item for item in totals.items())


def sum_stat(files: Sequence[tuple[bytes, int]], btime: int, ticks_per_s: int) -> bytes:
    """`files` come with their ticks a second. CPUs are numbered through, machine by machine."""
    totals: dict[bytes, list[int]] = {}
    cpus: list[bytes] = []
    for file, ticks in files:
        for line in file.splitlines():
            name, *words = line.split()
            values = [int(word) for word in words]
            if name.startswith(b"cpu"):
                values = [value * ticks_per_s // ticks for value in values]
            if name.startswith(b"cpu") and name != b"cpu":
                cpus.append(b"cpu%d %b" % (len(cpus), _joined(values)))
            else:
                totals[name] = _added(totals.get(name, []), values)
    whole = totals.pop(b"cpu", [0] * 10)
    totals[b"btime"] = [btime]
    rest = (b"%b %b" % (name, _joined(values)) for name, values in totals.items())
    return b"\n".join([b"cpu  " + _joined(whole), *cpus, *rest]) + b"\n"


def sum_loadavg(files: Iterable[bytes], processes: int, newest: int) -> bytes:
    """Three loads, what runs of how many, the newest process."""
    loads, running = [0.0, 0.0, 0.0], 0
    for file in files:
        words = file.split()
        loads = [load + float(word) for load, word in zip(loads, words, strict=False)]
        running += int(words[3].partition(b"/")[0])
    return b"%.2f %.2f %.2f %d/%d %d\n" % (*loads, running, processes, newest)


def sum_idle(files: Iterable[bytes]) -> float:
    """Seconds that CPUs were idle, of the second words of `uptime`."""
    return sum(float(file.split()[1]) for file in files)


def _added(one: list[int], other: list[int]) -> list[int]:
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    return [value + (shorter[n] if n < len(shorter) else 0) for n, value in enumerate(longer)]


def _joined(values: Iterable[int]) -> bytes:
    return b" ".join(b"%d" % value for value in values)
