"""Each default of each driver that works here, read back from one running instance."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.real import reading
from tests.real.checks import checks_of
from tests.real.conftest import Factory, LocalCluster, open_to_all, wait_for
from tests.real.reading import OUTSIDE, PORT, Subject

from tabane.runtimes import DEFAULTS
from tabane.runtimes.defaults import all_drivers

pytestmark = pytest.mark.real

HERE = Path(__file__).parent
READ = ("crun", "runc", "containerd", "runsc", "wasmtime", "qemu-microvm", "qemu")
NOT_HERE = {"firecracker", "kata", "containerd-firecracker", "solo5-spt", "solo5-hvt"}
"""What they need is not to be had from Debian, or needs KVM."""
CLAIMS = {driver.name: driver for driver in all_drivers()}


@pytest.fixture(scope="module")
def cluster(make_cluster: Factory) -> LocalCluster:
    return make_cluster(["tokyo"])


@pytest.fixture(scope="module")
def drivers(cluster: LocalCluster) -> dict[str, dict[str, Any]]:
    """Those that work, once the last trial has ended."""

    def working() -> dict[str, dict[str, Any]]:
        found = json.loads(cluster.tabane("doctor", "--json").out)["drivers"]
        return {row["driver"]: row for row in found if row["works"]}

    return wait_for(lambda: found if set(READ) <= (found := working()).keys() else None, "trials")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By kind, as an app file names them."""
    place = open_to_all(tmp_path_factory.mktemp("images"))
    program = reading.make_example("wasm-c", place)
    return {"linux": f"rootfs:{reading.make_image(place)}", "wasm": f"wasm:{program}"}


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with reading.outside():
        yield


@pytest.fixture(scope="module", params=READ)
def subject(
    request: pytest.FixtureRequest,
    cluster: LocalCluster,
    drivers: dict[str, dict[str, Any]],
    images: dict[str, str],
    world: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Subject]:
    """One instance of each driver in turn."""
    driver = drivers[request.param]
    kind = CLAIMS[request.param].capabilities.images[0]
    made = reading.deploy(cluster, driver, images[kind], tmp_path_factory.mktemp("app"))
    yield made
    failures = [event for event in cluster.records("events", made.name) if "reason" in event]
    assert failures == [], "it ended while it was read"
    assert cluster.tabane("stop", made.instance["id"]).code == 0
    wait_for(lambda: not cluster.instances(made.name), "its end")


def test_every_driver_that_works_is_read(drivers: dict[str, dict[str, Any]]) -> None:
    assert drivers.keys() - NOT_HERE == set(READ)


@pytest.mark.parametrize("name", CLAIMS)
def test_there_is_a_check_for_every_claim(name: str) -> None:
    """Also of those that do not work here."""
    driver = CLAIMS[name]
    claimed = [row.default for row in driver.enforcements() if row.enforced]
    unread = [c for c in claimed if not checks_of(c, can_exec=driver.capabilities.exec)]
    assert unread == []


def test_the_world_is_there(world: None, images: dict[str, str]) -> None:
    """What instances cannot reach or do, others can."""
    url = f"http://{OUTSIDE}:{PORT}/"
    argv = ("busybox", "wget", "-qO-", url)
    assert subprocess.run(argv, capture_output=True, check=True).stdout == b"outside"
    names = ("busybox", "nslookup", "crun.tabane", str(OUTSIDE))
    assert str(OUTSIDE) in subprocess.run(names, capture_output=True, text=True, check=True).stdout
    gaining = images["linux"].removeprefix("rootfs:") + "/bin/gaining"
    done = subprocess.run((gaining, "euid"), user=33, capture_output=True, check=True)
    assert done.stdout == b"0\n"


@pytest.mark.parametrize("default", DEFAULTS)
def test_it_is_enforced_as_it_says(subject: Subject, default: str) -> None:
    claims = {row["default"]: row["enforced"] for row in subject.driver["defaults"]}
    if claims[default]:
        for check in checks_of(default, can_exec=subject.can_exec):
            check(subject)
