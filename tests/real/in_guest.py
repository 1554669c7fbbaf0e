"""Run within a guest by `test_cgroup2`: what the driver named as argument 1 keeps to, by the checks
named after it. Says `passed CHECK` for each on the console."""

from __future__ import annotations

import asyncio
import sys
import traceback
from pathlib import Path

from tabane.runtimes import load
from tabane.runtimes.cgroups import find_hierarchies
from tabane.testing.container_bench import ContainerBench
from tabane.testing.containers import make_tree
from tabane.testing.drivers import DRIVER_CHECKS
from tabane.testing.spawner import PlainSpawner

GROUND = Path("/ground")


async def main(name: str, *wanted: str) -> None:
    assert find_hierarchies() == {"": Path("/sys/fs/cgroup")}, find_hierarchies()
    GROUND.mkdir(mode=0o711)
    spawner = PlainSpawner()
    driver = load(name, spawner, GROUND / name)
    probe = await driver.probe()
    assert probe.works, probe
    bench = ContainerBench(driver, spawner, GROUND, make_tree(GROUND))
    for check in DRIVER_CHECKS:
        if check.__name__ in wanted:
            await check(bench)
            print(f"passed {check.__name__}", flush=True)
    driver.close()  # type: ignore[attr-defined]
    await spawner.aclose()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except BaseException:
        traceback.print_exc(file=sys.stdout)
