"""The command lines of hosts, the wasmtime program and tenders: pure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabane.errors import UsageError
from tabane.model import App, InstanceId, Reactive, Resources
from tabane.runtimes.api import Image, InstanceSpec, Link
from tabane.runtimes.unikernel import host, wasmtime
from tabane.runtimes.unikernel.binary import Binary
from tabane.runtimes.unikernel.host import Confinement, Run, exec_argv, options, run_argv
from tabane.runtimes.unikernel.manifest import Device, Unikernel
from tabane.runtimes.unikernel.modules import name_of
from tabane.runtimes.unikernel.solo5 import Attached, check_unikernel, tender_argv

LINK = Link(3, "10.1.2.3", "10.1.0.1", 77, 1)
IMAGE = Image(
    "sha256:0", Path("/tree"), entrypoint=("/p.wasm", "a"), cmd=("b",), env=("A=1", "B=2")
)


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "find_host", lambda: "/host")


def make_spec(image: Image = IMAGE, **fields: object) -> InstanceSpec:
    app = App(name="app", image="sha256:0", **fields)  # type: ignore[arg-type]
    place = Path("/place")
    return InstanceSpec(InstanceId("i"), app, image, LINK, place, place / "log", "/c")


def test_confinement() -> None:
    plain = Confinement(Path("/root-dir"), Path("/f.bpf"))
    assert options(plain) == ("--root=/root-dir", "--filter=/f.bpf", "--id=65532")
    linked = Confinement(
        *(Path("/r"), Path("/f"), LINK, (Path("/cg/cpu"), Path("/cg/pids"))),
        binds=("/a:/b",),
        pid_file=Path("/pid"),
        errors=Path("/errors"),
    )
    assert options(linked) == (
        *("--errors=/errors", "--root=/r", "--filter=/f", "--id=65532", "--pid-file=/pid"),
        *("--cgroup=/cg/cpu", "--cgroup=/cg/pids", "--bind=/a:/b"),
        *("--user-namespace=/proc/77/ns/user", "--network-namespace=/proc/77/ns/net"),
    )
    argv = exec_argv(plain, ("/tender", "--mem=1"), ("A=1",), ("--cpu-s=9",))
    assert argv[:2] == ("/host", "exec")
    assert argv[-5:] == ("--cpu-s=9", "--env=A=1", "--", "/tender", "--mem=1")


def test_a_module() -> None:
    run = Run(Path("/lib.so"), Path("/m"), Path("/t"), 65536, ("/p.wasm", "-x"), ("A=1",))
    argv = run_argv(Confinement(Path("/r"), Path("/f")), run)
    assert argv[-8:] == (
        *("--library=/lib.so", "--module=/m", "--trial=/t", "--memory-bytes=65536", "--env=A=1"),
        *("--", "/p.wasm", "-x"),
    )
    assert not any(word.startswith("--port") for word in argv)


def test_what_a_program_is_given() -> None:
    plain = make_spec()
    assert wasmtime.arguments_of(plain.app, IMAGE) == ("/p.wasm", "a", "b")
    own = make_spec(command=("x", "y"), env={"B": "3", "C": "4"})
    assert wasmtime.arguments_of(own.app, IMAGE) == ("/p.wasm", "x", "y")
    assert wasmtime.environment_of(own.app, IMAGE) == ("A=1", "B=3", "C=4")
    assert wasmtime.workers_of(plain.app) == 1
    assert wasmtime.workers_of(make_spec(port=1, reactive=Reactive(concurrency=7)).app) == 7
    assert wasmtime.workers_of(make_spec(port=1, reactive=Reactive(concurrency=999)).app) == 64


def test_a_component_that_serves() -> None:
    spec = make_spec(port=80, reactive=Reactive(response_timeout_s=2.5))
    assert wasmtime.component_argv(spec, ("/ld", "/w")) == (
        *("/ld", "/w", "serve", "-C", "cache=n", "--allow-precompiled", "-S", "cli"),
        *("-W", f"max-memory-size={(256 - 32) << 20}", "--env", "A=1", "--env", "B=2"),
        *("-W", "timeout=2500ms", "--no-logging-prefix", "--addr", "10.1.2.3:80"),
        "/program.cwasm",
    )


def test_a_component_that_runs_once() -> None:
    argv = wasmtime.component_argv(make_spec(), ("/w",))
    assert argv[:2] == ("/w", "run")
    assert argv[-5:] == ("--argv0", "/p.wasm", "/program.cwasm", "a", "b")


def test_room() -> None:
    module, component = Binary(False, (), ()), Binary(True, (), ())
    wasmtime.check_room(make_spec(port=1, resources=Resources(pids=12)).app, module)
    for fields, binary, words in (
        ({"resources": Resources(memory_bytes=8 << 20)}, module, "more than 8 MiB"),
        ({"resources": Resources(memory_bytes=32 << 20)}, component, "more than 32 MiB"),
        ({"port": 1, "resources": Resources(pids=11)}, module, "pids must be at least 12"),
    ):
        with pytest.raises(UsageError, match=words):
            wasmtime.check_room(make_spec(**fields).app, binary)


def test_a_tender() -> None:
    command = ("--ipv4={address}/16", "--via={gateway}", "plain")
    attached = Attached({"service": "tap0"}, {"service": "02:00:00:00:00:01"}, {"d": "/disks/d"})
    assert tender_argv("/tender", make_spec(command=command), attached) == (
        *("/tender", "--mem=240", "--net:service=tap0", "--net-mac:service=02:00:00:00:00:01"),
        *("--block:d=/disks/d", "--", "/unikernel"),
        *("--ipv4=10.1.2.3/16", "--via=10.1.0.1", "plain"),
    )
    assert tender_argv("/t", make_spec(), Attached({}, {}, {})) == (
        *("/t", "--mem=240", "--", "/unikernel", "a", "b"),
    )


def test_another_machines_unikernel() -> None:
    there = Unikernel("spt", 2, "sparc", (Device("n", "net"),))
    with pytest.raises(UsageError, match="it is for sparc, this machine is"):
        check_unikernel(there, "spt", make_spec().app)


def test_kept_code_is_of_one_program_engine_and_processor() -> None:
    names = {name_of(*parts) for parts in (("a", "b", "c"), ("a", "bc", ""), ("ab", "", "c"))}
    assert len(names) == 3
