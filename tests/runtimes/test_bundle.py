"""The OCI configuration says what the app and the defaults say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.errors import Unsupported, UsageError
from tabane.model import App, InstanceId, Resources, SecurityPolicy, Services
from tabane.runtimes import bundle, seccomp
from tabane.runtimes.api import Image, InstanceSpec, Link

HOST = bundle.Host(open_files=20000, limits_swap=True, takes_bpf=True)


@pytest.fixture
def spec(tmp_path: Path) -> InstanceSpec:
    (tmp_path / "tree/bin").mkdir(parents=True)
    program = tmp_path / "tree/bin/serve"
    program.touch(mode=0o755)
    resources = Resources(cpu=0.5, memory_bytes=64 << 20, pids=32, disk_bytes=16 << 20)
    app = App(name="web", image="x", command=("serve", "-x"), id_base=100000, resources=resources)
    link = Link(3, "10.0.0.3", "10.0.0.1", 4321, 99)
    image = Image("sha256:x", tmp_path / "tree")
    place, log = Path("/run/i"), Path("/run/i.log")
    return InstanceSpec(InstanceId("abc"), app, image, link, place, log, "/tabane/c/n/abc")


def make(spec: InstanceSpec, host: bundle.Host = HOST, usr: Path | None = None) -> dict[str, Any]:
    program = bundle.make_program(spec.app, spec.image, {})
    config: dict[str, Any] = json.loads(bundle.make_config(spec, program, host, usr))
    return config


def test_process(spec: InstanceSpec) -> None:
    app = replace(spec.app, env={"A": "1", "PATH": "/bin"}, workdir="/srv")
    image = replace(spec.image, env=("A=0", "B=2"), user="5:6")
    process = make(replace(spec, app=app, image=image))["process"]
    assert process["args"] == ["/.tabane/init", "--", "serve", "-x"]
    assert process["env"] == ["PATH=/bin", "A=1", "B=2"]
    assert process["cwd"] == "/srv"
    assert process["user"] == {"uid": 5, "gid": 6, "additionalGids": []}
    assert process["noNewPrivileges"] is True


def test_services_are_shown_to_who_asks_for_them(spec: InstanceSpec) -> None:
    assert "/run/tabane" not in {mount["destination"] for mount in make(spec)["mounts"]}
    asking = replace(
        spec,
        app=replace(spec.app, services=Services(("deploys",)), env={"TABANE_HUB": "elsewhere"}),
        services=Path("/run/i/services"),
    )
    config = make(asking)
    (mount,) = (m for m in config["mounts"] if m["destination"] == "/run/tabane")
    assert (mount["source"], mount["type"]) == ("/run/i/services", "bind")
    assert mount["options"] == ["bind", "ro", "nosuid", "nodev", "noexec"]
    assert "TABANE_HUB=unix:///run/tabane/hub.sock" in config["process"]["env"]
    assert not any("TABANE_HUB" in entry for entry in make(spec)["process"]["env"])


def test_namespaces(spec: InstanceSpec) -> None:
    linux = make(spec)["linux"]
    paths = {entry["type"]: entry.get("path") for entry in linux["namespaces"]}
    own = dict.fromkeys(("pid", "mount", "ipc", "uts", "cgroup"))
    assert paths == {"user": "/proc/4321/ns/user", "network": "/proc/4321/ns/net", **own}
    ids = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    assert linux["uidMappings"] == linux["gidMappings"] == ids


def test_resources_are_for_both_versions_of_cgroups(spec: InstanceSpec) -> None:
    """The runtime specification's `resources` are version-free: engines translate them to v2."""
    linux = make(spec)["linux"]
    assert linux["cgroupsPath"] == "/tabane/c/n/abc"
    assert linux["resources"] == {
        "pids": {"limit": 32},
        "memory": {"limit": 80 << 20, "swap": 80 << 20},
        "cpu": {"quota": 50000, "period": 100000},
        "devices": [{"allow": False, "access": "rwm"}],
    }
    without = make(spec, replace(HOST, limits_swap=False))["linux"]["resources"]
    assert without["memory"] == {"limit": 80 << 20}


@pytest.mark.parametrize(("found", "asked"), [(20000, 20000), (1 << 20, 65536), (1024, 1024)])
def test_limits_never_exceed_the_hard_one(spec: InstanceSpec, found: int, asked: int) -> None:
    limits = {
        r["type"]: r for r in make(spec, replace(HOST, open_files=found))["process"]["rlimits"]
    }
    assert limits["RLIMIT_NOFILE"] == {"type": "RLIMIT_NOFILE", "soft": asked, "hard": asked}


def test_the_hosts_usr(spec: InstanceSpec) -> None:
    assert all(mount["destination"] != "/usr" for mount in make(spec)["mounts"])
    mount = make(spec, usr=Path("/d/usr"))["mounts"][-1]
    assert (mount["destination"], mount["source"]) == ("/usr", "/d/usr")
    assert "ro" in mount["options"]


def test_compiled_filters_are_for_those_who_take_them(spec: InstanceSpec) -> None:
    assert "run.oci.seccomp_bpf_data" in make(spec)["annotations"]
    assert "annotations" not in make(spec, replace(HOST, takes_bpf=False))


def test_capabilities(spec: InstanceSpec) -> None:
    security = SecurityPolicy(capabilities=("CAP_NET_RAW",))
    given = make(replace(spec, app=replace(spec.app, security=security)))["process"]["capabilities"]
    assert set(given) == {"bounding", "effective", "permitted"}
    assert set(given["bounding"]) == bundle.DEFAULT_CAPABILITIES | {"CAP_NET_RAW"}


@pytest.mark.parametrize("name", ["CAP_SYS_MODULE", "NET_RAW", "cap_net_raw", ""])
def test_unknown_capabilities_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be given"):
        bundle.check_capabilities((name,))


@pytest.mark.parametrize(
    ("text", "number"), [("SIGTERM", 15), ("term", 15), ("9", 9), ("SIGRTMIN+3", 37)]
)
def test_stop_signals(text: str, number: int) -> None:
    assert bundle.parse_signal(text) == number


@pytest.mark.parametrize("text", ["", "SIGNOTHING", "0", "99", "TERM+x", "-9"])
def test_wrong_stop_signals(text: str) -> None:
    with pytest.raises(UsageError, match="is not a signal"):
        bundle.parse_signal(text)


def test_something_must_run(spec: InstanceSpec) -> None:
    app = replace(spec.app, command=())
    with pytest.raises(UsageError, match="has no command"):
        bundle.make_program(app, spec.image, {})
    image = replace(spec.image, entrypoint=("serve",), cmd=("-y",))
    assert bundle.make_program(app, image, {}).args == ("serve", "-y")


def test_a_link_is_needed(spec: InstanceSpec) -> None:
    with pytest.raises(Unsupported, match="network link"):
        make(replace(spec, link=None))


def test_capabilities_open_their_calls() -> None:
    def names(*capabilities: str) -> set[str]:
        found = seccomp.profile(frozenset(capabilities))["syscalls"]
        return {name for rule in found if "args" not in rule for name in rule["names"]}

    assert "read" in names() and "chroot" not in names() and "clone" not in names()
    assert names("CAP_SYS_CHROOT") - names() == {"chroot"}
    assert {"mount", "clone", "setns"} <= names("CAP_SYS_ADMIN") - names()


def test_nothing_is_allowed_twice() -> None:
    """A call that is allowed with certain arguments only must not stand in the plain list too."""
    for capabilities in (frozenset[str](), frozenset(bundle.OPTIONAL_CAPABILITIES)):
        plain, *conditional = seccomp.profile(capabilities)["syscalls"]
        assert not {n for rule in conditional for n in rule["names"]} & set(plain["names"])


def test_the_compiled_filter_is_a_bpf_program() -> None:
    program = seccomp.compile_filter(frozenset())
    assert len(program) % 8 == 0 and 100 < len(program) // 8 < 4096
    assert program != seccomp.compile_filter(frozenset({"CAP_SYS_CHROOT"}))
