"""An app's logs are followed over data centers, while instances, agents and nodes come and go."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.real.conftest import LocalCluster, wait_for

pytestmark = pytest.mark.real

COUNTING = """
i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done &
echo here >/tmp/index.html; exec busybox httpd -f -p 8000 -h /tmp
"""


@pytest.fixture(scope="module")
def cluster(borrowed: LocalCluster) -> LocalCluster:
    return borrowed


class Followed:
    """What a `tabane logs -f` has said so far, in two files."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process = process
        self._out = out
        self._err = err

    def numbers(self) -> dict[str, list[int]]:
        """By instance."""
        found = defaultdict(list)
        for line in self._out.read_text().splitlines(True):
            if line.endswith("\n"):
                instance, number = line.split(" | ")
                found[instance].append(int(number))
        return found

    def complaints(self) -> list[str]:
        return self._err.read_text().splitlines()


@contextmanager
def following(cluster: LocalCluster, directory: Path, app: str) -> Iterator[Followed]:
    out, err = directory / "out", directory / "err"
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root)]
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen([*command, "logs", "-f", app], stdout=stdout, stderr=stderr)
    with process:
        try:
            yield Followed(process, out, err)
        finally:
            process.kill()


def test_an_app_is_followed_wherever_it_starts(cluster: LocalCluster, tmp_path: Path) -> None:
    cluster.deploy("counts", ["sh", "-c", COUNTING])
    with following(cluster, tmp_path, "counts") as followed:

        def goes_on(instance: str) -> None:
            before = len(followed.numbers()[instance])
            wait_for(lambda: len(followed.numbers()[instance]) > before + 5, f"more of {instance}")

        instances = []
        for datacenter in ("tokyo", "osaka"):
            instances.append(cluster.wake("counts", datacenter, "/")["id"])
            goes_on(instances[-1])
        for node in ("osaka/osaka-1", "tokyo/tokyo-1"):
            cluster.kill("agentd", node)
            goes_on(instances[0])
            goes_on(instances[1])
            wait_for(lambda node=node: f"tabane: {node} is back" in followed.complaints())
        cluster.kill("hubd")
        cluster.wait_whole()
        instances.append(cluster.wake("counts", "ishikari", "/")["id"])
        goes_on(instances[-1])
        assert cluster.tabane("stop", instances[0]).code == 0
        assert cluster.tabane("rm", "counts").code == 0
        assert followed.process.wait(60) == 0
        numbers = followed.numbers()
        assert set(numbers) == set(instances)
        for instance in instances:
            assert numbers[instance] == list(range(len(numbers[instance])))
            log = cluster.tabane("logs", instance).out.split()
            assert log == [str(number) for number in numbers[instance]]
