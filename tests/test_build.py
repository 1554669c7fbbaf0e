"""The build of what is in C, as hatchling runs it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
INTERFACE = "hatchling.builders.hooks.plugin.interface"


class Hook:
    """What hatchling's own class gives a hook."""

    target_name = "wheel"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """hatch_build.py, which runs where hatchling is."""
    interface: Any = types.ModuleType(INTERFACE)
    interface.BuildHookInterface = Hook
    monkeypatch.setitem(sys.modules, INTERFACE, interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def beside(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with all sources, and with a module that was made before."""
    for name, path in list(vars(build).items()):
        if isinstance(path, Path) and path.is_relative_to(ROOT / "src"):
            copy = tmp_path / path.relative_to(ROOT / "src")
            copy.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, copy)
            monkeypatch.setattr(build, name, copy)
    (build.SOURCE.parent / "_native.cpython-39-old.so").touch()
    return tmp_path


def can_build(build: Any) -> bool:
    try:
        build.find_compiler()
        build.find_headers()
    except build.Missing:
        return False
    return True


def run(build: Any, version: str = "standard") -> dict[str, Any]:
    """What the hook tells hatchling."""
    data: dict[str, Any] = {"force_include": {}, "pure_python": True, "infer_tag": False}
    hook = build.CustomBuildHook()
    hook.initialize(version, data)
    data["made"] = [Path(made).is_file() for made in data["force_include"]]
    hook.finalize(version, data, "")
    return data


def test_it_is_there_where_it_can_be_built(build: Any) -> None:
    """So that its tests run on every machine with a compiler."""
    there = importlib.util.find_spec("tabane.middlecon._native") is not None
    assert there == can_build(build), "scripts/setup test builds it"
    if can_build(build):
        assert os.access(build.HOST.parent / "_host", os.X_OK)


def test_a_wheel_has_it_and_is_for_one_platform(build: Any) -> None:
    data = run(build)
    compiled = can_build(build)
    assert data["made"] == [True] * len(build.parts()) * compiled
    assert (data["pure_python"], data["infer_tag"]) == (not compiled, compiled)
    names = set(data["force_include"].values())
    assert "tabane/runtimes/unikernel/_host" in names or not compiled
    assert all((ROOT / "src" / name).parent.is_dir() for name in names)
    assert not any(Path(made).exists() for made in data["force_include"])


def test_an_editable_installation_has_it_beside_its_source(build: Any, beside: Path) -> None:
    data = run(build, "editable")
    assert data["force_include"] == {}
    module = beside / "tabane/middlecon"
    assert len(list(module.glob("_native.*.so"))) == can_build(build)
    assert not (module / "_native.cpython-39-old.so").exists()
    assert (build.HOST.parent / "_host").exists() == can_build(build)


@pytest.mark.parametrize("version", ["standard", "editable"])
@pytest.mark.parametrize("compiler", ["false", "true-but-not-there"])
def test_without_a_compiler_there_is_a_line_for_each_and_a_pure_wheel(
    build: Any,
    beside: Path,
    version: str,
    compiler: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(build.sysconfig, "get_config_var", {"EXT_SUFFIX": ".so"}.get)
    monkeypatch.setattr(build.shutil, "which", lambda name: name if name == "false" else None)
    data = run(build, version)
    assert (data["force_include"], data["pure_python"], data["infer_tag"]) == ({}, True, False)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("tabane: middlecon goes without its module in C: ")
    assert err.count("\n") == len(build.parts())


def test_a_source_that_does_not_compile_is_one_line_too(
    build: Any, beside: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build.SOURCE.write_text("#error nothing\n" * 100)
    assert run(build, "editable")["pure_python"] != can_build(build)
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 2 * build.MAX_WORDS
    assert sorted(path.name for path in build.SOURCE.parent.iterdir()) == ["_native.c"]


def test_only_wheels_are_compiled_for(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hook, "target_name", "sdist")
    assert run(build)["pure_python"]
