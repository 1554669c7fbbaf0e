"""What `tabane doctor` finds out without a cluster: every driver tried on this machine.

`python -m tabane.tools.probing DIRECTORY` prints it as JSON. It is run in a mount namespace of its
own, as nodes have: a trial shows nobody its mounts, which end with it, and an empty cgroup2
hierarchy is out of the way.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabane.errors import EngineError


def probe_machine() -> dict[str, Any]:
    """The same as a node's answer, of this machine; `lacks`: what a local cluster needs beside."""
    from tabane.node.local import missing

    with tempfile.TemporaryDirectory(prefix="tabane-doctor-") as scratch:
        Path(scratch).chmod(0o711)
        drivers = _probe_apart(scratch)
    return {"node": "", "lacks": missing(), "drivers": drivers}


def _probe_apart(scratch: str) -> Any:
    from tabane.node.cgroups import find_hierarchies

    program = [sys.executable, "-m", "tabane.tools.probing", scratch]
    if os.geteuid() == 0:
        found = find_hierarchies()
        hidden = found.v2 if found.is_hybrid else ()
        lines = [f"umount {shlex.quote(str(path))}" for path in hidden]
        script = "\n".join([*lines, 'exec "$@"'])
        program = ["unshare", "--mount", "--", "sh", "-ec", script, "sh", *program]
    done = subprocess.run(program, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-1:] or ["it gave no reason"]
        raise EngineError(f"this machine cannot be probed: {words[0]}")
    return json.loads(done.stdout)


async def _probe(directory: Path) -> list[dict[str, Any]]:
    from tabane.runtimes import registry
    from tabane.testing.spawner import PlainSpawner

    rows = []
    spawner = PlainSpawner()
    for name in registry.names():
        driver = registry.load(name, spawner, directory / name)
        rows.append(registry.describe(driver, await registry.probe_whole(driver)))
    await spawner.aclose()
    return rows


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_probe(Path(sys.argv[1])))))
