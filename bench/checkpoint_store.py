"""What keeping checkpoints costs: writing, opening, disk, and how late the event loop is meanwhile.

The memory of Python programs, as a dump has it, once for each way of compressing. Times are
medians, with the disk's own pace in them (`syncfs`) and whatever else the machine does; "cpu" is
how long processors were busy with it, the least of all rounds, which a busy machine changes less.

    python bench/checkpoint_store.py [FILE...]      # memory images of your own, of virtual machines
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

from tabane.clock import SYSTEM
from tabane.images.checkpoint import CheckpointStore, seal
from tabane.testing.dumps import about, cool

ROUNDS = 7
PAGE = 4096
PROGRAMS = {
    "http.server": "import http.server, json, ssl, asyncio",
    "fastapi": "import fastapi, uvicorn, rich, pydantic",
}
WAYS = {"no compression": (1, 0.0), "zstd -3": (-3, 0.9), "zstd -1": (-1, 0.9), "zstd 1": (1, 0.9)}
"""Level, and `seal.WORTH`."""
MEMORY = Path("/dev/shm")


def dump_memory(program: str, target: Path) -> None:
    """What CRIU would take of a Python program: the pages that are in no file."""
    argv = (sys.executable, "-c", f"{program}; print(flush=True); input()")
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        target.write_bytes(b"".join(_pages(process.pid)))
        process.kill()


def _pages(pid: int) -> Iterator[bytes]:
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if "[v" in line:  # vdso, vvar, vsyscall
            continue
        entries = os.pread(pagemap, (end - start) // PAGE * 8, start // PAGE * 8)
        for number, (entry,) in enumerate(struct.iter_unpack("Q", entries)):
            if entry >> 63 and not entry >> 61 & 1:  # present, and not of a file
                yield os.pread(memory, PAGE, start + number * PAGE)
    os.close(memory)
    os.close(pagemap)


class Lag:
    """How late the event loop came back, ms, each millisecond."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            task.cancel()

    async def _watch(self) -> None:
        while True:
            before = SYSTEM.now()
            await asyncio.sleep(0.001)
            self.seen.append((SYSTEM.now() - before) * 1e3 - 1)

    def p99(self) -> float:
        return sorted(self.seen)[int(len(self.seen) * 0.99)]


async def measure(image: Path, place: Path, worth: float, level: int) -> list[str]:
    seal.LEVEL, seal.WORTH = level, worth
    size = image.stat().st_size
    writes, opens, warm, lag = [], [], [], Lag()
    busy_writes, busy_opens = [], []
    store = CheckpointStore(place / "disk", place / "memory", place / "key", memory_bytes=1 << 32)
    await store.load()
    stored = None
    for _ in range(ROUNDS):
        async with store.dump(0) as dump:
            shutil.copyfile(image, dump.directory / "pages-1.img")
            for number in range(40):
                (dump.directory / f"core-{number}.img").write_bytes(os.urandom(100 * number))
            gc.collect()
            async with lag.watched():
                before, busy = SYSTEM.now(), time.process_time()
                stored = await dump.keep(about(id_base=0))
                writes.append(SYSTEM.now() - before)
                busy_writes.append(time.process_time() - busy)
        await cool(store, stored.digest)
        async with lag.watched():
            before, busy = SYSTEM.now(), time.process_time()
            (await store.open(stored.digest)).close()
            opens.append(SYSTEM.now() - before)
            busy_opens.append(time.process_time() - busy)
        before = SYSTEM.now()
        (await store.open(stored.digest)).close()
        warm.append(SYSTEM.now() - before)
        await cool(store, stored.digest)
        await store.remove(stored.digest)
    assert stored is not None
    return [
        f"{stored.disk_bytes / 1e6:.1f}",
        f"{median(writes) * 1e3:.0f}",
        f"{size / min(busy_writes) / 1e6:.0f}",
        f"{median(opens) * 1e3:.0f}",
        f"{size / min(busy_opens) / 1e6:.0f}",
        f"{median(warm) * 1e6:.0f}",
        f"{lag.p99():.1f}",
    ]


def main(files: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="tabane-bench-") as scratch:
        images = [Path(file) for file in files]
        for name, program in PROGRAMS.items() if not files else ():
            images.append(Path(scratch) / name)
            dump_memory(program, images[-1])
        heads = ("disk MB", "write ms", "MB/cpu s", "open ms", "MB/cpu s", "warm us", "lag p99 ms")
        print(f"{'':24} {'':14}", *(f"{head:>10}" for head in heads))
        for image in images:
            for way, (level, worth) in WAYS.items():
                with (
                    tempfile.TemporaryDirectory(prefix="tabane-bench-") as disk,
                    tempfile.TemporaryDirectory(prefix="tabane-bench-", dir=MEMORY) as memory,
                ):
                    (Path(disk) / "memory").symlink_to(memory)
                    told = asyncio.run(measure(image, Path(disk), worth, level))
                name = f"{image.name} {image.stat().st_size / 1e6:.0f} MB"
                print(f"{name:24} {way:14}", *(f"{cell:>10}" for cell in told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
