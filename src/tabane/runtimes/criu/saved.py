"""What a checkpoint's directory has beside CRIU's images: the writable layer, what the engine knew
of the container, and a record (`restore.json`) of what a restore must know.

    *.img          CRIU's
    layer.tar      what was written to the instance's own layer, and to its /dev
    engine-NAME    files of the engine's state (crun: `status`, `seccomp.bpf`; runc: `state.json`)
    restore.json   `Saved`
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tabane.errors import EngineError
from tabane.model import InstanceId, Value
from tabane.runtimes.contents import Contents

LAYER = "layer.tar"
ENGINE_PREFIX = "engine-"
PACK_TIMEOUT_S = 60.0
OF_THE_INSTANCE = ("hostname", "hosts", "resolv.conf")
"""In /etc: each instance has its own."""
_TAR = ("tar", "--numeric-owner", "--xattrs", "--xattrs-include=*", "--sparse", "--warning=none")


class Names(Value, frozen=True):
    """Of one instance, as its engine's state has them."""

    id: InstanceId
    directory: str
    cgroup: str
    link_pid: int


class Saved(Contents, frozen=True, kw_only=True):
    """`external`: mount points of what is not in the images, among which `files` are such;
    `outputs`: names in the images of what it had as stdout and stderr; the clocks, as the program
    saw them when it stood still; `names`: of the instance that was dumped."""

    engine: str
    external: tuple[str, ...]
    files: tuple[str, ...]
    outputs: tuple[str, str]
    monotonic_ns: int
    boottime_ns: int
    names: Names


# The layer


def pack(layer: Path, directory: Path) -> None:
    """Raises `EngineError`, also when there is no room."""
    target = directory / LAYER
    _tar(*_TAR, "--create", "--file", str(target), "--directory", str(layer), "up", "dev")


def unpack(directory: Path, layer: Path) -> None:
    """Over what is there, except what is each instance's own. Raises `EngineError`."""
    own = (f"--exclude=up/etc/{name}" for name in OF_THE_INSTANCE)
    source = directory / LAYER
    _tar(*_TAR, "--anchored", *own, "--extract", "--preserve-permissions", "--file", str(source),
         "--directory", str(layer))  # fmt: skip


def _tar(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PACK_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise EngineError(f"tar did not end within {PACK_TIMEOUT_S:.0f} s", argv=argv) from None
    if done.returncode != 0:
        words = done.stderr.strip().partition("\n")[0] or f"it ended with {done.returncode}"
        raise EngineError(words, argv=argv, status=done.returncode, output=words)


# The engine's state


def save_state(state: Path, directory: Path) -> None:
    """Keep what the engine knows of a container; its configuration is made for each instance."""
    for path in state.iterdir():
        if path.is_file() and path.name != "config.json":
            (directory / f"{ENGINE_PREFIX}{path.name}").write_bytes(path.read_bytes())


def write_state(saved: Saved, directory: Path, state: Path, new: Names) -> None:
    """Give the engine the state of a container that it never started: that of the one that was
    dumped, with names (`new`) and, once it runs (`complete_state`), processes of its own."""
    old = saved.names
    names = {
        old.directory: new.directory,
        old.cgroup: new.cgroup,
        f"/proc/{old.link_pid}/": f"/proc/{new.link_pid}/",
        old.id: new.id,
    }
    state.mkdir(mode=0o700)
    for path in directory.glob(f"{ENGINE_PREFIX}*"):
        data = path.read_bytes()
        if path.name not in (f"{ENGINE_PREFIX}status", f"{ENGINE_PREFIX}state.json"):
            (state / path.name.removeprefix(ENGINE_PREFIX)).write_bytes(data)
            continue
        content = _without_process(_rename(json.loads(data), names))
        (state / path.name.removeprefix(ENGINE_PREFIX)).write_text(json.dumps(content))
    config = Path(new.directory) / "config.json"
    if saved.engine == "crun":
        (state / "config.json").write_bytes(config.read_bytes())


def _rename(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _rename(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_rename(each, names) for each in value]
    if isinstance(value, str):
        for old, new in names.items():
            value = value.replace(old, new)
    return value


def _without_process(content: dict[str, Any]) -> dict[str, Any]:
    content.update({name: 0 for name in (*CRUN_PROCESS, *RUNC_PROCESS) if name in content})
    if "cgroup_paths" in content:  # runc joins all of them, and only some were made
        paths = content["cgroup_paths"].items()
        content["cgroup_paths"] = {name: path for name, path in paths if Path(path).is_dir()}
    return content


CRUN_PROCESS = ("pid", "process-start-time")
RUNC_PROCESS = ("init_process_pid", "init_process_start")


def complete_state(state: Path, pid: int, start_ticks: int) -> None:
    """Say which process it is. Idempotent; of a container that the engine itself started, it
    changes nothing."""
    for name, keys in (("status", CRUN_PROCESS), ("state.json", RUNC_PROCESS)):
        path = state / name
        content = json.loads(path.read_bytes()) if path.exists() else {}
        if content.get(keys[0]) != 0:
            continue
        content.update(dict(zip(keys, (pid, start_ticks), strict=True)))
        for kind, place in content.get("namespace_paths", {}).items():
            content["namespace_paths"][kind] = f"/proc/{pid}/ns/{place.rpartition('/')[2]}"
        path.write_text(json.dumps(content))
