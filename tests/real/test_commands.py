"""The commands as people type them, against a real cluster; each also with --json."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from tests.real.conftest import Ended, LocalCluster, to_toml, wait_for

pytestmark = pytest.mark.real

ROOT = Path(__file__).parent.parent.parent
NODES = {"tokyo/tokyo-1", "osaka/osaka-1", "ishikari/ishikari-1"}
TALKING = r"""
echo out; echo err >&2; printf '\033[1mbold\033[0m\n'
mkdir /tmp/www; echo here >/tmp/www/index.html
exec busybox httpd -f -p 8000 -h /tmp/www
"""


def good(ended: Ended) -> str:
    """Its output; it said nothing else."""
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def of_json(ended: Ended) -> Any:
    assert ended.out.isascii()
    return json.loads(good(ended))


def refused(ended: Ended, *words: str, code: int = 2) -> None:
    assert (ended.code, ended.out) == (code, "")
    assert ended.err.startswith("tabane: ") and ended.err.count("\n") == 1
    assert all(word in ended.err for word in words)


def app_file(directory: Path, name: str, **fields: Any) -> str:
    file = directory / f"{name}.toml"
    top = {"name": name, "image": "host", "command": ["sh", "-c", TALKING], "port": 8000}
    top |= {"hosts": [f"{name}.test"]} | fields
    file.write_text(to_toml(top, {"reactive": {"stop_after": "1h", "stop_timeout": "1s"}}))
    return str(file)


@contextmanager
def following(
    cluster: LocalCluster, *argv: str, stdin: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """A command that goes on, and its output; killed if it is still there at the end."""
    command = [sys.executable, "-m", "tabane.tools.cli", "--root", str(cluster.root), *argv]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=stdin, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        try:
            yield process, process.stdout
        finally:
            process.kill()


def interrupt(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.fixture(scope="module")
def awake(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The one instance of the app `talks`."""
    good(cluster.tabane("deploy", app_file(tmp_path_factory.mktemp("talks"), "talks")))
    return cluster.wake("talks", path="/")


def test_deploy_a_new_app_and_again(cluster: LocalCluster, tmp_path: Path) -> None:
    file = app_file(tmp_path, "fresh")
    everywhere = "known in tokyo, osaka, ishikari\n"
    stored = good(cluster.tabane("deploy", file))
    first = int(stored.split()[2])
    assert stored == f"default/fresh revision {first} stored; {everywhere}"
    unchanged = "is what the file says, nothing was changed"
    same = f"default/fresh revision {first} {unchanged}; {everywhere}"
    assert good(cluster.tabane("deploy", file)) == same
    again = of_json(cluster.tabane("deploy", "--force", file, "--json"))
    assert (again["name"], again["revision"], again["unreachable"]) == ("fresh", first + 1, [])
    assert again["known"] == ["tokyo", "osaka", "ishikari"]
    good(cluster.tabane("scale", "fresh", "--max", "30"))
    assert f"revision {first + 1} is what the file says" in good(cluster.tabane("deploy", file))
    text = Path(file).read_text().replace("port = 8000", "port = 8001")
    changed = cluster.tabane("deploy", "-", stdin=text)
    assert changed.out == f"default/fresh revision {first + 2} stored; {everywhere}"
    undone = "min is 0 and max 10 again, as the file says; `tabane scale` had set 0 and 30"
    assert changed.err == f"tabane: default/fresh: {undone}\n"


def test_a_data_center_that_is_not_there(cluster: LocalCluster, tmp_path: Path) -> None:
    file = tmp_path / "far.toml"
    top = {"name": "far", "image": "host", "command": ["true"]}
    file.write_text(to_toml(top, {"placement": {"datacenters": ["kyoto"]}}))
    there = "there is no data center kyoto (there are: tokyo, osaka, ishikari)"
    ended = cluster.tabane("deploy", str(file))
    assert ended.code == 0
    assert f"{there}, so it can run nowhere\n" in ended.err
    assert "nothing ever starts it" in ended.err
    answer = json.loads(cluster.tabane("deploy", "--json", str(file)).out)
    assert len(answer["warnings"]) == 2
    assert f"note      placement.datacenters: {there}" in good(cluster.tabane("show", "far"))
    good(cluster.tabane("rm", "far"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prot": 80}, ":6: prot: there is no such field: did you mean port?"),
        ({"class": "microvm"}, "is a host image, and class microvm runs linux images"),
        ({"driver": "lxc"}, "bad.toml:6: driver: there is none named lxc"),
        ({"image": "rootfs:./nowhere"}, "bad.toml:2: image: "),
    ],
)
def test_deploy_a_bad_file(
    cluster: LocalCluster, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    refused(cluster.tabane("deploy", app_file(tmp_path, "bad", **fields)), words)
    refused(cluster.tabane("show", "bad"), "there is no app default/bad", code=1)


def test_apps(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    heading, *rows = good(cluster.tabane("apps")).splitlines()
    columns = "APP CLASS REV IMAGE DIGEST PORT HOSTS READY"
    assert heading.split() == columns.split()
    revision = str(awake["revision"])
    assert ["talks", "container", revision, "host", "-", "8000", "talks.test", "1/1"] in [
        row.split() for row in rows
    ]
    apps = {app["name"]: app for app in of_json(cluster.tabane("apps", "--json"))["apps"]}
    assert (apps["talks"]["ready"], apps["talks"]["class"]) == (1, "container")


def test_show(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    out = good(cluster.tabane("show", "talks"))
    revision = awake["revision"]
    assert out.startswith(f"default/talks  revision {revision}  class container\n")
    for words in ("instances (1)", awake["id"], awake["address"], "latest wakes (1)", "cold"):
        assert words in out
    shown = of_json(cluster.tabane("show", "default/talks", "--json"))
    assert [instance["instance"] for instance in shown["instances"]] == [awake["id"]]
    assert shown["app"]["command"] == ["sh", "-c", TALKING]
    refused(cluster.tabane("show", "other/talks"), "there is no app other/talks", code=1)


def test_scale(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    assert good(cluster.tabane("scale", "talks", "--max", "7")) == "talks: min 0, max 7\n"
    scaled = of_json(cluster.tabane("scale", "talks", "--max", "8", "--json"))
    assert (scaled["reactive"]["min"], scaled["reactive"]["max"]) == (0, 8)
    refused(
        cluster.tabane("scale", "talks", "--min", "9", "--max", "8"), "min 9 and max 8 do not fit"
    )
    refused(cluster.tabane("scale", "talks", "--max", "1000001"), "--max")
    refused(cluster.tabane("scale", "nobody", "--max", "1"), "no app default/nobody", code=1)


def test_wakes(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    heading, row = good(cluster.tabane("wakes", "talks")).splitlines()
    assert heading.split()[:6] == ["AT", "DC", "NODE", "APP", "TRUST", "OPTION"]
    assert row.split()[1:6] == [*awake["node"].split("/"), "talks", "-", "cold"]
    (wake,) = of_json(cluster.tabane("wakes", "talks", "-n", "1", "--json"))["wakes"]
    assert wake["instance"] == awake["id"]
    assert sum(wake["phases_us"].values()) == pytest.approx(wake["total_us"], rel=0.1)
    refused(cluster.tabane("wakes", "nobody"), "there is no app default/nobody", code=1)


def test_events(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    out = good(cluster.tabane("events", "-n", "2000"))
    assert f"{' '.join(awake['node'].split('/'))} talks {awake['id']} ready" in out
    lines = good(cluster.tabane("events", "--json", "-n", "2000")).splitlines()
    mine = [event for event in map(json.loads, lines) if event["instance"] == awake["id"]]
    assert [event["state"] for event in mine] == ["starting", "ready"]
    assert len(good(cluster.tabane("events", "-n", "1")).splitlines()) == 1


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_events_are_followed(cluster: LocalCluster, json_too: tuple[str, ...]) -> None:
    name = f"followed{len(json_too)}"
    cluster.deploy("before")
    cluster.wake("before")
    cluster.deploy(name)
    with following(cluster, "events", "-f", "-n", "1", *json_too) as (process, out):
        assert "before" in out.readline() or json_too
        instance = cluster.wake(name)["id"]
        seen = [out.readline()]
        while not (instance in seen[-1] and "ready" in seen[-1]):
            seen.append(out.readline())
        mine = [line for line in seen if instance in line]
        assert len(mine) == len(set(mine)) == 2
        interrupt(process)


def test_logs(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    """As they are, each stream to its own."""
    whole = Ended(0, "out\n\x1b[1mbold\x1b[0m\n", "err\n")
    assert cluster.tabane("logs", "talks") == cluster.tabane("logs", awake["id"]) == whole
    last = cluster.tabane("logs", "talks", "-n", "1")
    assert (last.out + last.err).count("\n") == 1
    stamped = cluster.tabane("logs", "-t", "--tail", "3", "talks").out.splitlines()
    assert all(line[:2] == "20" for line in stamped)
    assert [line.partition("Z ")[2] for line in stamped] == ["out", "\x1b[1mbold\x1b[0m"]
    lines = good(cluster.tabane("logs", "talks", "--json")).splitlines()
    found = {(line["stream"], line["text"]) for line in map(json.loads, lines)}
    assert found == {("stdout", "out"), ("stderr", "err"), ("stdout", "\x1b[1mbold\x1b[0m")}
    refused(cluster.tabane("logs", "nobody"), "no instance is called nobody", code=1)


def test_logs_are_followed_until_ctrl_c(cluster: LocalCluster) -> None:
    cluster.deploy("writes", ["sh", "-c", "echo begun; exec sleep 1000"], port=None,
                   reactive={"min": 1, "ready": "started"})  # fmt: skip
    (instance,) = wait_for(lambda: cluster.instances("writes", "ready"), "its start")
    with following(cluster, "logs", "-f", "writes") as (process, out):
        assert out.readline() == f"{instance['id']} | begun\n"
        assert process.poll() is None
        interrupt(process)
    assert of_json(cluster.tabane("rm", "writes", "--json"))["app"] == "default/writes"
    wait_for(lambda: not cluster.instances("writes"), "its end")
    assert good(cluster.tabane("logs", instance["id"])).startswith("begun\n")


COUNTS = "i=0; while [ $i -lt 150000 ]; do echo $i of many lines that are written; i=$((i+1)); done"


def test_following_over_rotations_and_to_the_end(cluster: LocalCluster) -> None:
    """Several megabytes, which are rotated while they are followed."""
    script = f"sleep 2; {COUNTS}"
    cluster.deploy("counts", ["sh", "-c", script], port=None,
                   reactive={"min": 1, "ready": "started"})  # fmt: skip
    (instance,) = wait_for(lambda: cluster.instances("counts", "ready"), "its start")
    with following(cluster, "logs", "-f", instance["id"]) as (process, out):
        lines = out.read().splitlines()
        assert process.wait(60) == 0
    good(cluster.tabane("rm", "counts"))
    assert [int(line.split()[0]) for line in lines] == list(range(150_000))
    assert good(cluster.tabane("logs", instance["id"])).splitlines() == lines
    place = cluster.root / "nodes" / instance["node"] / "logs" / instance["id"]
    assert (place / "log.2").exists(), "it was rotated twice"


def test_all_instances_of_an_app_are_followed_at_once(cluster: LocalCluster) -> None:
    script = "echo I am $HOSTNAME; sleep 1000"
    cluster.deploy("chorus", ["sh", "-c", script], port=None,
                   reactive={"min": 2, "ready": "started"})  # fmt: skip
    both = wait_for(
        lambda: len(found := cluster.instances("chorus", "ready")) == 2 and found, "both"
    )
    ids = sorted(instance["id"] for instance in both)
    wait_for(lambda: len(cluster.tabane("logs", "chorus").out.splitlines()) == 2, "both lines")
    with following(cluster, "logs", "-f", "chorus") as (process, out):
        first = sorted([out.readline(), out.readline()])
        assert [line.partition(" | ")[0] for line in first] == ids
        for identity in ids:
            good(cluster.tabane("exec", identity, "sh", "-c", "echo too >/proc/1/fd/1"))
        told = sorted([out.readline(), out.readline()])
        assert told == [f"{identity} | too\n" for identity in ids]
        shown = of_json(cluster.tabane("logs", "-n", "1", "--json", ids[0]))
        assert shown["text"] == "too"
        good(cluster.tabane("rm", "chorus"))
        assert process.wait(60) == 0


def test_since(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    run = cluster.tabane
    assert run("logs", "--since", "1h", "talks") == run("logs", "talks")
    assert good(run("logs", "--since", "2100-01-01T00:00:00Z", "talks")) == ""
    refused(run("logs", "--since", "yesterday", "talks"), "write an age as 10m or 2h")


def test_an_instance_by_the_beginning_of_its_id(
    cluster: LocalCluster, awake: dict[str, Any]
) -> None:
    assert good(cluster.tabane("exec", awake["id"][:6], "echo", "here")) == "here\n"
    refused(cluster.tabane("exec", awake["id"][:3], "echo"), "no instance is called", code=125)


def test_logs_of_one_that_said_nothing(cluster: LocalCluster) -> None:
    cluster.deploy("quiet")
    refused(cluster.tabane("logs", "quiet"), "the app quiet is at rest", code=1)
    instance = cluster.wake("quiet")["id"]
    good(cluster.tabane("stop", instance[:8]))
    wait_for(lambda: not cluster.instances("quiet"), "its end")
    assert good(cluster.tabane("logs", instance)) == ""
    refused(cluster.tabane("exec", "quiet", "true"), "the app quiet is at rest", code=125)


def test_exec(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    run = cluster.tabane
    assert good(run("exec", "talks", "echo", "-n", "--flag")) == "--flag"
    assert good(run("exec", awake["id"], "--", "cat", "/tmp/www/index.html")) == "here\n"
    assert run("exec", "talks", "--", "sh", "-c", "echo no >&2; exit 3") == (3, "", "no\n")
    assert run("exec", "talks", "sh", "-c", "kill -9 $$").code == 137
    shown = run("exec", "--json", "talks", "--", "sh", "-c", r"printf '\033\377'; exit 4")
    assert shown.code == 4
    assert json.loads(shown.out) == {"code": 4, "stdout": "\x1b\\xff", "stderr": ""}
    refused(run("exec", "--timeout", "0.1", "talks", "sleep", "60"), "within 0.1 s", code=124)
    refused(run("exec", "nobody", "ls"), "no instance is called nobody", code=125)


@pytest.mark.parametrize("stdin", [subprocess.DEVNULL, subprocess.PIPE])
def test_ctrl_c_ends_what_exec_began(
    cluster: LocalCluster, awake: dict[str, Any], stdin: int
) -> None:
    def running() -> list[Path]:
        return [path for path in Path("/proc").glob("[0-9]*") if is_mine(path)]

    def is_mine(path: Path) -> bool:
        try:
            return (path / "cmdline").read_bytes() == b"sleep\0001004.5\0"
        except OSError:
            return False

    command = ["exec", "-i", "talks", "sh", "-c", "setsid sleep 1004.5 & sleep 1004.5"]
    with following(cluster, *command, stdin=stdin) as (process, _):
        wait_for(lambda: len(running()) == 2, "both of its processes")
        interrupt(process)
    wait_for(lambda: not running(), "their end")


def test_exec_passes_stdin_on(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    run = cluster.tabane
    assert good(run("exec", "-i", "talks", "cat", stdin="hi\n" * 100_000)) == "hi\n" * 100_000
    assert good(run("exec", "-i", "talks", "head", "-c2", stdin="hi\n" * 100_000)) == "hi"
    assert good(run("exec", "-i", "talks", "cat", stdin="")) == ""
    assert good(run("exec", "talks", "cat", stdin="not for it\n")) == ""
    with following(cluster, "exec", "-i", "talks", "true", stdin=subprocess.PIPE) as (process, _):
        assert process.wait(30) == 0, "its stdin is still open"


def test_exec_as_another_user(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    run = cluster.tabane
    script = ("sh", "-c", "id -u; id -g; pwd")
    assert good(run("exec", "talks", *script)) == "0\n0\n/\n"
    other = good(run("exec", "--user", "nobody:nogroup", "-w", "/tmp", "talks", *script))
    assert other == "65534\n65534\n/tmp\n"
    assert good(run("exec", "-u", "7:8", "talks", *script)) == "7\n8\n/\n"
    refused(run("exec", "-u", "nosuch", "talks", "id"), "the image has no user 'nosuch'", code=125)
    refused(run("exec", "-w", "tmp", "talks", "pwd"), "'tmp' is not an absolute path", code=125)
    for missing in ("/nope", "/etc/passwd"):
        said = f"workdir: there is no directory {missing} in the instance"
        refused(run("exec", "-w", missing, "talks", "pwd"), said, code=125)
    assert run("exec", "talks", "nosuch").code == 127
    assert run("exec", "talks", "/etc/passwd") == (126, "", "/etc/passwd: cannot be executed\n")


def test_stop(cluster: LocalCluster) -> None:
    cluster.deploy("stops")
    first = cluster.wake("stops")
    told = good(cluster.tabane("stop", first["id"]))
    assert told == f"{first['id']} on {first['node']} is told to stop\n"
    wait_for(lambda: not cluster.instances("stops"), "its end")
    second = cluster.wake("stops")
    (told,) = of_json(cluster.tabane("stop", "stops", "--json"))["instances"]
    assert told["instance"] == second["id"]
    wait_for(lambda: not cluster.instances("stops"), "its end")
    again = cluster.tabane("stop", "stops")
    assert (again.code, "no instance of stops runs" in again.err) == (0, True)
    refused(cluster.tabane("stop", "nothing-there"), "no instance is called nothing-there", code=1)


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_the_first_page_s_app_answers(cluster: LocalCluster, page: str, tmp_path: Path) -> None:
    text = (ROOT / page).read_text()
    (app,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert "curl -H 'Host: hello.test' http://GATEWAY/ " in text
    (tmp_path / "hello.toml").write_text(app)
    good(cluster.tabane("deploy", str(tmp_path / "hello.toml")))
    answer = cluster.get("hello", path="/")
    assert (answer.status, answer.body) == (200, "hello from Tabane\n")
    good(cluster.tabane("rm", "hello"))


def test_rm(cluster: LocalCluster) -> None:
    cluster.deploy("goes")
    gone = good(cluster.tabane("rm", "goes"))
    assert gone == "default/goes removed; known in tokyo, osaka, ishikari\n"
    refused(cluster.tabane("rm", "goes"), "no app default/goes", code=1)
    assert cluster.get("goes").status == 404


def test_members(cluster: LocalCluster) -> None:
    heading, *rows = good(cluster.tabane("members")).splitlines()
    assert heading.split() == ["DC", "NODE", "GATEWAY", "HUB", "STORE", "DRIVERS", "INSTANCES"]
    assert {"/".join(row.split()[:2]) for row in rows} == NODES
    members = of_json(cluster.tabane("members", "--json"))["members"]
    linked = {f"{one['dc']}/{one['node']}" for one in members if one["linked"]}
    assert linked == NODES
    assert sum(member["control"] for member in members) == 1


def test_doctor(cluster: LocalCluster) -> None:
    out = good(cluster.tabane("doctor", "--node", "osaka-1"))
    assert out.startswith("node osaka/osaka-1\n")
    assert ["runc", "container", "yes", "runc"] in [line.split()[:4] for line in out.splitlines()]
    found = of_json(cluster.tabane("doctor", "--node", "osaka/osaka-1", "--json"))
    assert (found["dc"], found["node"]) == ("osaka", "osaka-1")
    assert {"runc", "crun"} <= {driver["driver"] for driver in found["drivers"]}
    refused(
        cluster.tabane("doctor", "--node", "nara"), "no node 'nara', only tokyo/tokyo-1", code=1
    )


@pytest.mark.parametrize(
    ("argv", "columns"),
    [
        ((), "DC NODE APP CLASS PID USER %CPU RSS STAT TIME COMMAND"),
        (("aux",), "DC NODE APP CLASS USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"),
        (("-ef",), "DC NODE APP CLASS UID PID PPID C STIME TTY TIME CMD"),
    ],
)
def test_ps(
    cluster: LocalCluster, awake: dict[str, Any], argv: tuple[str, ...], columns: str
) -> None:
    heading, *rows = good(cluster.tabane("ps", *argv)).splitlines()
    assert heading.split() == columns.split()
    assert {"/".join(row.split()[:2]) for row in rows} == NODES
    assert any(row.endswith(" tabane-netns infinity") for row in rows) is bool(argv)
    assert not [row for row in rows if row.endswith(" sleep infinity")]
    (mine,) = [row for row in rows if row.endswith(" busybox httpd -f -p 8000 -h /tmp/www")]
    assert mine.split()[:4] == [*awake["node"].split("/"), "talks", "container"]


def test_ps_of_some(cluster: LocalCluster, awake: dict[str, Any]) -> None:
    rows = of_json(cluster.tabane("ps", "--json", "--app", "talks"))["processes"]
    assert {(row["app"], row["instance"]) for row in rows} == {("default/talks", awake["id"])}
    rows = of_json(cluster.tabane("ps", "--json", "--dc", "osaka"))["processes"]
    assert {row["dc"] for row in rows} == {"osaka"}
    rows = of_json(cluster.tabane("ps", "--json", "--node", "osaka-1"))["processes"]
    assert {row["node"] for row in rows} == {"osaka-1"}
    refused(
        cluster.tabane("ps", "--app", "nobody"), "there is no app default/nobody, only ", code=1
    )
    refused(cluster.tabane("ps", "--dc", "nara"), "no data center nara, only tokyo, osaka", code=1)
    refused(
        cluster.tabane("ps", "--node", "nara-1"), "no node 'nara-1', only tokyo/tokyo-1", code=1
    )
