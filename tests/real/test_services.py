"""Apps that ask for middlecon: their instances are members, and see nothing else of the node."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from tests.real.conftest import Factory, LocalCluster, wait_for

from tabane.errors import TabaneError
from tabane.middlecon.blocking import Client, Room, connect

pytestmark = pytest.mark.real

uvloop.new_event_loop().close()
"""The first loop of a process opens descriptors for good: so before any test."""

TOKYO = "tokyo/tokyo-1"
APPS = ("workers", "by-runc", "by-crun")

PROGRAM = r"""
import os, socket, struct, time

HEADER = struct.Struct(">IBBHIII")
MAGIC, HELLO, PING, PONG, JOIN, ASK, ACK, NACK = b"\xffmc1", 1, 5, 6, 10, 21, 30, 31
RUN = os.urandom(8).hex()
dials = 0


def frame(kind, flags=0, to=0, id=0, value=0, name="", data=b""):
    name = name.encode()
    rest = name + data
    return HEADER.pack(16 + len(rest), kind, flags, len(name), to, id, value) + rest


def text(value):
    return bytes([0xD9, len(value)]) + value.encode()


def read(file):
    length, kind, flags, size, to, id, value = HEADER.unpack(file.read(20))
    rest = file.read(length - 16)
    return kind, id, rest[:size].decode(), rest[size:]


def look(what):
    try:
        return repr(eval(what))
    except Exception as error:
        return repr(error)


def serve():
    global dials
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.environ["TABANE_HUB"].removeprefix("unix://"))
        dials += 1
        hello = text("name") + text("worker") + text("instance") + text(RUN)
        sock.sendall(MAGIC + frame(HELLO, data=b"\x82" + hello))
        file = sock.makefile("rb")
        file.read(4)
        read(file)
        for room in ("deploys", "secret"):
            sock.sendall(frame(JOIN, flags=1, id=1, name=room))
        while True:
            kind, id, name, data = read(file)
            if kind == PING:
                sock.sendall(frame(PONG))
            elif kind == ASK:
                sock.sendall(frame(ACK, id=id, data=look(data.decode()).encode()))
            elif kind == NACK:
                print(name, data.decode(), flush=True)


while True:
    try:
        serve()
    except (OSError, struct.error):
        time.sleep(0.05)
"""
COMMAND = ["/usr/bin/python3", "-c", PROGRAM]
SERVICES = {"middlecon": ["deploys", "chat.*"]}


def names(cluster: LocalCluster, *apps: str) -> set[str]:
    """Of the members that the apps' instances are."""
    return {
        f"default/{app}-{instance['id']}/worker"
        for app in apps
        for instance in cluster.instances(app, "ready")
    }


def deploy(cluster: LocalCluster, name: str, instances: int, driver: str = "") -> None:
    cluster.deploy(
        name,
        COMMAND,
        port=None,
        driver=driver,
        reactive={"min": instances, "ready": "started"},
        services=SERVICES,
    )
    wait_for(lambda: len(cluster.instances(name, "ready")) == instances, f"{name}'s instances")


@pytest.fixture(scope="module")
def workers(make_cluster: Factory) -> LocalCluster:
    """Two nodes; three instances by the first engine that works, and one by each engine."""
    cluster = make_cluster(["tokyo"], 2)
    deploy(cluster, "workers", 3)
    deploy(cluster, "by-runc", 1, "runc")
    deploy(cluster, "by-crun", 1, "crun")
    return cluster


@pytest.fixture
def outside(workers: LocalCluster) -> Iterator[Client]:
    hub = workers.root / "nodes" / TOKYO / "hub.sock"
    with connect(f"unix://{hub}", name="outside") as me:
        yield me


@pytest.fixture
def room(workers: LocalCluster, outside: Client) -> Room:
    """Once all are in it."""
    room = outside.join("deploys", member=False)
    expected = names(workers, *APPS)
    assert len(expected) >= 5  # more, when a node was away for so long that others took over
    wait_for(lambda: room.members.keys() >= expected, "the members")
    return room


def ask(room: Room, what: str) -> dict[str, str]:
    """What each instance finds; nothing while there is no session."""
    try:
        replies = room.ask(what.encode(), timeout_s=10)
    except TabaneError:
        return {}
    return {member: data.decode() for member, data in replies.answers.items()}


def test_all_instances_answer_under_their_identity(workers: LocalCluster, room: Room) -> None:
    answers = ask(room, "socket.gethostname()")
    assert set(answers) == names(workers, *APPS)
    for member, hostname in answers.items():
        assert member == f"default/{hostname[1:-1]}/worker"


def test_a_room_that_was_not_asked_for_is_denied(workers: LocalCluster, room: Room) -> None:
    for app in APPS:
        for name in names(workers, app):
            said = f"denied {name} may not enter the room secret: its app asks for deploys, chat.*"
            wait_for(lambda: said in workers.tabane("logs", app).out, "its refusal")  # noqa: B023


def test_only_its_own_socket_is_there(room: Room) -> None:
    assert set(ask(room, 'os.environ["TABANE_HUB"]').values()) == {"'unix:///run/tabane/hub.sock'"}
    assert set(ask(room, 'os.listdir("/run/tabane")').values()) == {"['hub.sock']"}
    for attempt in ('open("/run/tabane/x", "w")', 'os.unlink("/run/tabane/hub.sock")'):
        assert all("Read-only" in answer for answer in ask(room, attempt).values())
    mount = '[m.split()[3] for m in open("/proc/self/mountinfo") if m.split()[4] == "/run/tabane"]'
    for member, source in ask(room, mount).items():
        assert source == f"['/{instance_of(member)}/services']"


def test_every_user_in_there_may_connect(workers: LocalCluster, room: Room) -> None:
    program = (
        "import os, socket; os.setgid(1000); os.setuid(1000); "
        "s = socket.socket(socket.AF_UNIX); s.connect('/run/tabane/hub.sock'); print(os.getuid())"
    )
    for app in ("by-runc", "by-crun"):
        assert workers.inside(app, "/usr/bin/python3", "-c", program) == (0, "1000\n")


def test_who_does_not_ask_has_nothing(workers: LocalCluster) -> None:
    workers.deploy("plain")
    workers.wake("plain")
    code, out = workers.inside("plain", "sh", "-c", "ls /run; echo ${TABANE_HUB-none}")
    assert (code, out) == (0, "none\n")
    workers.tabane("rm", "plain")


def test_after_kill_9_of_the_agent_nobody_has_left(workers: LocalCluster, room: Room) -> None:
    before = ask(room, "dials")
    workers.kill("agentd")
    assert ask(room, "dials") == before
    wait_for(lambda: workers.answers(TOKYO), "the agent's return")
    workers.wait_whole()
    assert ask(room, "dials") == before


def test_after_kill_9_of_hub_and_agent_it_is_back(workers: LocalCluster, room: Room) -> None:
    before = ask(room, "(RUN, socket.gethostname())")
    dials = ask(room, "dials")
    node = workers.instances("workers")[0]["node"]
    workers.kill("hubd", node)
    workers.kill("agentd", node)
    wait_for(lambda: ask(room, "(RUN, socket.gethostname())").items() >= before.items(), "them all")
    again = ask(room, "dials")
    there = {i["id"] for app in APPS for i in workers.instances(app) if i["node"] == node}
    assert {member for member in before if again[member] != dials[member]} == {
        member for member in before if instance_of(member) in there
    }
    workers.wait_whole()


def instance_of(member: str) -> str:
    """The id in `default/APP-ID/worker`."""
    return member.split("/")[1].rpartition("-")[2]


def test_what_is_shown(workers: LocalCluster) -> None:
    assert "  services  middlecon: deploys, chat.*\n" in workers.tabane("show", "workers").out


def test_at_its_end_member_and_socket_go(workers: LocalCluster, room: Room) -> None:
    instance, gone = workers.instances("by-crun")[0], names(workers, "by-crun")
    place = node_files(workers, str(instance["node"])) / "run" / instance["id"] / "services"
    assert (place / "hub.sock").is_socket()
    assert workers.tabane("rm", "by-crun").code == 0
    wait_for(lambda: not gone & room.members.keys(), "its leave")
    wait_for(lambda: not place.exists(), "the end of its files")


def node_files(cluster: LocalCluster, node: str) -> Path:
    """The node's directory as its own processes see it."""
    return Path("/proc", str(cluster.holder(node)), "root", "mnt")
