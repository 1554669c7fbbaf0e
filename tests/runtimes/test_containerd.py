"""What containerd's driver says of a machine that lacks something."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tabane.runtimes.containerd.driver import containerd
from tabane.testing.spawner import PlainSpawner


@pytest.mark.parametrize(
    ("module", "package"), [("google.protobuf", "protobuf"), ("grpclib", "grpclib")]
)
async def test_a_package_that_is_missing_has_the_name_by_which_pip_knows_it(
    module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setitem(sys.modules, module, None)
    spawner = PlainSpawner()
    probe = await containerd(spawner, tmp_path).probe()
    await spawner.aclose()
    assert not probe.works
    assert f"the Python package {package} is missing" in probe.reason
