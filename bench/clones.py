"""Clones of one checkpoint that all go on at the same time: is the fiftieth as fast as the second?

Each is restored by its driver alone, one after the other, and stays. The program is a Python one
with some modules, which hardly does anything. Times are from the order to the driver's answer, in
ms; the first one is apart, as it finds nothing in the caches.

`CLONES` is how many, `ONLY` names engines, separated by commas. A full run takes about a minute.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from report import Report, percentile, summary
from tabane.images import ImageStore
from tabane.model import Resources
from tabane.runtimes import load, mounts
from tabane.testing.container_bench import ContainerBench, make_app
from tabane.testing.containers import make_instance, open_directory, without_unified
from tabane.testing.spawner import PlainSpawner

CLONES = int(os.environ.get("CLONES", "50"))
ONLY = os.environ.get("ONLY", "crun,runc,runsc").split(",")
APART = "TABANE_BENCH_APART"
GROUP = 5
SLOWER = 1.25
"""What the last ones may take of what the second and those after it do: more is a trend."""
PROGRAM = """
import asyncio, email.message, http.server, json, ssl, time
count = 0
while True:
    count += 1
    print(count, flush=True)
    time.sleep(2)
"""
SIZE = Resources(cpu=1.0, memory_bytes=96 << 20, pids=32, disk_bytes=4 << 20)


def main() -> int:
    report = Report("clones", "Clones of one checkpoint, one after the other (ms)")
    with open_directory() as ground, without_unified():
        for engine in ONLY:
            took_ms = asyncio.run(clone_all(engine, ground))
            early, late = took_ms[1 : 1 + GROUP], took_ms[-GROUP:]
            report.row(engine=engine, clones="1", **summary(took_ms[:1]))
            report.row(engine=engine, clones=f"2 to {1 + GROUP}", **summary(early))
            report.row(engine=engine, clones=f"the last {GROUP} of {CLONES}", **summary(late))
            ratio = percentile(late, 50) / percentile(early, 50)
            report.bar(f"{engine}: the last beside the first", ratio, SLOWER, unit="times")
    return report.finish()


async def clone_all(engine: str, ground: Path) -> list[float]:
    image = await ImageStore(ground / "store").prepare("host")
    spawner = PlainSpawner()
    driver = load(engine, spawner, ground / engine)
    probe = await driver.probe()
    if not probe.works:
        raise SystemExit(f"{engine} does not work here: {probe.reason}")
    bench = ContainerBench(driver, spawner, ground, image)
    app = make_app(("/usr/bin/python3", "-c", PROGRAM), name="cloned", resources=SIZE)
    try:
        with in_memory(ground) as images:
            async with bench.running(app) as origin:
                await asyncio.sleep(2)  # it has imported all by then
                await driver.checkpoint(origin.handle, images, leave_running=False)
            return await restore_all(bench, app, images)
    finally:
        driver.close()  # type: ignore[attr-defined]
        await spawner.aclose()


async def restore_all(bench: ContainerBench, app: object, images: Path) -> list[float]:
    took_ms = []
    async with AsyncExitStack() as stack:
        for _ in range(CLONES):
            spec = await stack.enter_async_context(
                make_instance(bench.ground, bench.image, app)  # type: ignore[arg-type]
            )
            handle = await bench.driver.prepare(spec)
            stack.push_async_callback(bench.driver.destroy, handle)
            began = time.perf_counter()
            await bench.driver.restore(spec, handle, images)
            took_ms.append((time.perf_counter() - began) * 1000)
    return took_ms


@contextmanager
def in_memory(ground: Path) -> Iterator[Path]:
    """As a node has its checkpoints."""
    place = Path(tempfile.mkdtemp(dir=ground))
    mounts.mount("tmpfs", place, "size=512m,mode=0711")
    try:
        (place / "images").mkdir(mode=0o700)
        yield place / "images"
    finally:
        mounts.unmount(place)


if __name__ == "__main__":
    if APART not in os.environ:  # it mounts, and nothing of that is for the machine
        os.environ[APART] = "1"
        apart = ("unshare", "--mount", "--propagation", "private", sys.executable)
        os.execvp(apart[0], (*apart, *sys.argv))
    raise SystemExit(main())
