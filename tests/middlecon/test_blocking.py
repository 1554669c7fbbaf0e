"""The blocking client, from threads, against a real hub in another thread."""

from __future__ import annotations

import contextlib
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tabane.errors import (
    Busy,
    Closed,
    Conflict,
    NotFound,
    Refused,
    Stale,
    Unreachable,
    UsageError,
)
from tabane.middlecon import (
    Cause,
    Change,
    Client,
    Limits,
    MemberInfo,
    OwnState,
    Presence,
    Room,
    StateChange,
    blocking,
)
from tabane.middlecon.blocking import connect

WAIT_S = 60.0
"""No test waits so long, unless something is broken."""


class Heard:
    """Collects what callbacks are called with; `wait` returns once there are so many."""

    def __init__(self):
        self.items = []
        self._changed = threading.Condition()

    def __call__(self, *arguments):
        with self._changed:
            self.items.append(arguments[0] if len(arguments) == 1 else arguments)
            self._changed.notify_all()

    def wait(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.items) >= count, WAIT_S), self.items
            return list(self.items)


def test_the_example_of_the_manual(hub):
    with connect(hub.url, name="web-1") as me, connect(hub.url, name="web-2") as web_2:
        room, other = me.join("deploys"), web_2.join("deploys")
        said = []

        @other.on_message
        def heard(message):
            said.append((message.sender, message.data, message.room, message.wants_reply))
            return b"ok"

        receipt = room.say(b"v42 is out", timeout_s=5.0)
        assert (receipt.acknowledged, receipt.failed, receipt.complete) == (("web-2",), {}, True)
        assert room.ask(b"load?", timeout_s=5.0).answers == {"web-2": b"ok"}
        room.cast(b"tick")
        web_2.state.put("load", b"0.7")
        assert me.join("deploys") is room
        assert room.ask(b"again").complete and room.state["web-2"]["load"] == b"0.7"
        assert room.members == {name: MemberInfo(name, "hub") for name in ("web-1", "web-2")}
        assert (me.name, me.hub, me.hubs, me.connected) == ("web-1", "hub", {}, True)
    assert said == [
        ("web-1", b"v42 is out", "deploys", False),
        ("web-1", b"load?", "deploys", True),
        ("web-1", b"tick", "deploys", False),
        ("web-1", b"again", "deploys", True),
    ]


def test_calls_and_the_errors_they_raise(hub):
    x, y = hub.client("x"), hub.client("y")
    with pytest.raises(Refused, match="y takes no messages"):
        x.call("y", b"")

    @y.on_message(concurrent=True)
    def handle(message):
        if message.data == b"stale":
            raise Stale("generation 3 is no longer current")
        return message.data * 2

    assert x.call("y", b"ab") == b"abab"
    assert x.send("y", b"ab") is None
    with pytest.raises(Refused, match="generation 3") as refused:
        x.call("y", b"stale")
    assert refused.value.reason == "stale"
    x.send_nowait("y", b"ab", urgent=True)
    assert x.hub_stats()["sessions"] == 2
    with pytest.raises(NotFound, match="no member nobody"):
        x.call("nobody", b"")
    with pytest.raises(UsageError, match="cut it up"):
        x.call("y", b"x" * ((1 << 20) + 1))
    with pytest.raises(UsageError, match="cut it up"):
        x.send_nowait("y", b"x" * ((1 << 20) + 1))


@pytest.mark.parametrize("name", ["a\x07b", "x" * 256])
def test_bad_names_are_refused(hub, name):
    with pytest.raises(UsageError):
        connect(hub.url, name=name)
    with pytest.raises(UsageError):
        hub.client("x").join(name)


def test_what_a_connect_may_fail_with(hub, tmp_path):
    with pytest.raises(UsageError, match="no hub's address"):
        connect("http://127.0.0.1")
    with pytest.raises(UsageError, match="have one at least"):
        connect(hub.url, workers=0)
    with pytest.raises(Unreachable, match="no hub at"):
        connect(f"unix://{tmp_path}/none", timeout_s=0.01)
    hub.client("x")
    with pytest.raises(Conflict, match="x is taken"):
        connect(hub.url, name="x", timeout_s=0.01)


def test_what_a_handler_may_raise(hub, caplog):
    x, y = hub.client("x"), hub.client("y")
    errors = {b"1": ZeroDivisionError("no"), b"2": StopIteration(), b"3": SystemExit(3)}

    @y.on_message
    def handle(message):
        if message.data in errors:
            raise errors[message.data]
        return "text" if message.data else None

    for data, word in ((b"1", "ZeroDivision"), (b"2", "StopIter"), (b"3", "SystemExit")):
        with pytest.raises(Refused, match=word):
            x.call("y", data)
    with pytest.raises(Refused, match="returns bytes or None, not str"):
        x.call("y", b"4")
    assert x.call("y", b"") == b""
    assert "ZeroDivisionError" in caplog.text


def test_coroutine_functions_are_refused(hub):
    x = hub.client("x")
    room = x.join("r")

    async def handle(message):
        pass

    for register in (x.on_message, room.on_message, room.on_presence, x.on_connected):
        with pytest.raises(UsageError, match="handle is a coroutine function"):
            register(handle)
    with pytest.raises(UsageError, match="handle is a coroutine function"):
        x.join("s", on_message=handle)


def test_one_senders_messages_are_handled_in_order_and_others_overlap(hub):
    x, y, z = (hub.client(name) for name in "xyz")
    log, gate = [], threading.Event()

    @z.on_message
    def handle(message):
        log.append(message.data)
        if message.data == b"1":
            assert gate.wait(WAIT_S)

    x.send_nowait("z", b"1")
    x.send_nowait("z", b"2")
    with ThreadPoolExecutor() as pool:
        third = pool.submit(x.send, "z", b"3", timeout_s=WAIT_S)
        y.call("z", b"of y", timeout_s=WAIT_S)
        assert sorted(log) == [b"1", b"of y"] and not third.done()
        gate.set()
        third.result(WAIT_S)
    assert [data for data in log if data != b"of y"] == [b"1", b"2", b"3"]


def test_handlers_may_call_each_other_deeper_than_there_are_workers(hub):
    x, y = hub.client("x", workers=1), hub.client("y", workers=1)

    def handler(me, other):
        def handle(message):
            depth = int(message.data)
            if depth == 0:
                return b"end"
            return me.call(other, b"%d" % (depth - 1), timeout_s=WAIT_S)

        return handle

    x.on_message(concurrent=True)(handler(x, "y"))
    y.on_message(concurrent=True)(handler(y, "x"))
    assert x.call("y", b"20", timeout_s=WAIT_S) == b"end"
    assert y.call("x", b"3", timeout_s=WAIT_S) == b"end"


def test_a_pool_runs_no_more_handlers_than_it_has_workers(hub):
    senders = [hub.client() for _ in range(4)]
    busy = hub.client("busy", workers=2)
    running, most, lock, full, gate = 0, 0, threading.Lock(), threading.Event(), threading.Event()

    @busy.on_message
    def handle(message):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if running == 2:
            full.set()
        assert gate.wait(WAIT_S)
        with lock:
            running -= 1

    with ThreadPoolExecutor() as pool:
        sent = [pool.submit(sender.send, "busy", b"", timeout_s=WAIT_S) for sender in senders]
        assert full.wait(WAIT_S)
        gate.set()
        for done in sent:
            done.result(WAIT_S)
    assert most == 2


def test_a_room_agrees_by_handlers_in_threads(hub):
    x, y = hub.client("x"), hub.client("y")
    room, other, heard = x.join("r"), y.join("r"), Heard()

    @other.on_prepare
    def prepare(proposal):
        x.on_hub(print)  # from a worker; on the loop's thread it would be refused
        if proposal.value == b"no":
            raise Stale("that is old")

    other.on_outcome(heard)
    assert room.agree(b"yes", timeout_s=WAIT_S).prepared == ("y",)
    refused = room.agree(b"no", timeout_s=WAIT_S).refused["y"]
    assert (refused.code, refused.text) == ("stale", "that is old")
    told = [(outcome.proposer, outcome.value, outcome.committed) for outcome in heard.wait(2)]
    assert told == [("x", b"yes", True), ("x", b"no", False)]


def test_many_threads_use_one_client(hub):
    me, other = hub.client("me"), hub.client("other")
    other.join("r", on_message=lambda message: message.data[::-1])
    other.on_message(lambda message: message.data[::-1])

    def work(number):
        room = me.join("r", member=False)
        for count in range(10):
            data = b"%d-%d" % (number, count)
            assert me.call("other", data, timeout_s=WAIT_S) == data[::-1]
            assert room.ask(data, timeout_s=WAIT_S).answers == {"other": data[::-1]}
            me.state.put(f"{number}", data)
            room.cast(data, urgent=number == 0)
            assert "other" in room.members and "other" in room.state
        return room

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(work, range(8)))) == 1
    assert dict(me.state) == {f"{number}": b"%d-9" % number for number in range(8)}


def test_state_is_told_in_order_and_gone_with_the_session(hub):
    x, y = hub.client("x"), hub.client("y")
    room = x.join("r")
    news, came = Heard(), Heard()
    assert room.on_state(news) is news
    room.on_presence(came)
    y.join("r")
    came.wait(1)
    for number in range(50):
        y.state.put("n", b"%d" % number)
    y.state.delete("n")
    y.state.delete("never was")
    expected = [StateChange("y", "n", b"%d" % number) for number in range(50)]
    assert news.wait(51) == [*expected, StateChange("y", "n", None)]
    with pytest.raises(KeyError):
        y.state["n"]
    y.close()
    assert came.wait(2) == [Presence("y", change, "hub") for change in (Change.JOINED, Change.LEFT)]
    assert set(room.members) == set(room.state) == {"x"}


def test_snapshots_are_the_callers_own(hub):
    x = hub.client("x")
    room = x.join("r")
    x.state.put("k", b"v")
    room.members.clear()
    room.state["x"].clear()
    x.hubs["none"] = True
    assert set(room.members) == {"x"} and x.hubs == {} and x.state.snapshot() == {"k": b"v"}


def test_a_value_over_the_limits_is_not_kept(hub):
    x = hub.client("x")
    with pytest.raises(Busy):
        x.state.put("k", b"v" * (Limits().state_bytes + 1))
    assert dict(x.state) == {} and len(x.state) == 0


def test_a_callback_may_wait_for_its_own_client(hub, caplog):
    x, y = hub.client("x"), hub.client("y")
    y.on_message(lambda message: b"hello, " + message.data)
    room, heard = x.join("r"), Heard()

    @room.on_presence
    def greet(presence):
        heard(x.call(presence.member, b"%s" % presence.change.name.encode(), timeout_s=WAIT_S))
        raise ValueError("this one is reported")

    y.join("r")
    z = hub.client("z")
    z.on_message(lambda message: b"z")
    z.join("r")
    assert heard.wait(2) == [b"hello, JOINED", b"z"]
    z.close()
    y.close()
    assert "this one is reported" in caplog.text


def test_a_room_that_is_left_is_entered_anew(hub):
    x, y = hub.client("x"), hub.client("y")
    room = x.join("r", on_message=lambda message: b"1")
    asking = y.join("r", member=False)
    assert asking.ask(b"").answers == {"x": b"1"}
    assert x.join("r", on_message=lambda message: b"2") is room
    assert asking.ask(b"").answers == {"x": b"2"}
    room.leave()
    room.leave()
    assert asking.ask(b"").acknowledged == ()
    with pytest.raises(Closed, match="not in the room"):
        room.say(b"")
    again = x.join("r")
    assert again is not room and asking.ask(b"").failed["x"].cause is Cause.REFUSED
    assert x.join("r") is again


def test_a_restart_of_the_hub(hub):
    x, y = hub.client("x"), hub.client("y")
    lost, back = Heard(), Heard()
    for client in (x, y):
        client.on_disconnected(lambda name=client.name: lost(name))
        client.on_connected(lambda name=client.name: back(name))
    x.join("r", on_message=lambda message: b"still here")
    room = y.join("r", member=False)
    x.state.put("k", b"v")
    hub.stop()
    assert sorted(lost.wait(2)) == ["x", "y"]
    with pytest.raises(Closed, match="no session"):
        x.send_nowait("y", b"")
    assert not x.connected and x.trouble
    x.state.put("new", b"w")
    hub.start()
    assert sorted(back.wait(2)) == ["x", "y"]
    assert room.ask(b"").answers == {"x": b"still here"}
    assert room.state["x"] == {"k": b"v", "new": b"w"}


def test_abort_is_a_crash_after_which_it_dials_again(hub):
    x, y = hub.client("x"), hub.client("y")
    lost, back = Heard(), Heard()
    started = threading.Event()
    x.on_disconnected(lambda: lost(1))
    x.on_connected(lambda: back(1))

    @y.on_message
    def hang(message):
        started.set()
        lost.wait(1)

    with ThreadPoolExecutor() as pool:
        call = pool.submit(x.call, "y", b"", timeout_s=WAIT_S)
        assert started.wait(WAIT_S)
        x.abort()
        with pytest.raises(Closed, match="dropped the connection"):
            call.result(WAIT_S)
    back.wait(1)
    assert x.connected


def test_what_waits_when_the_client_is_closed_raises_closed(hub):
    x, y = hub.client("x"), hub.client("y")
    room, started, gate = x.join("r"), threading.Event(), threading.Event()

    def hang(message):
        started.set()
        assert gate.wait(WAIT_S)

    y.on_message(hang)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(x.call, "y", b"", timeout_s=WAIT_S)
        assert started.wait(WAIT_S)
        closing = [pool.submit(x.close) for _ in range(3)]
        with pytest.raises(Closed, match="x was closed meanwhile"):
            call.result(WAIT_S)
        for done in closing:
            done.result(WAIT_S)
    gate.set()
    for action in (lambda: room.say(b""), lambda: x.join("s"), x.abort, lambda: room.cast(b"")):
        with pytest.raises(Closed, match="x is closed"):
            action()
    x.close()
    assert not x.connected and set(room.members) == {"x"} and x.hubs == {}


def test_a_handler_may_close_its_own_client(hub):
    x, y = hub.client("x"), hub.client("y")
    closed = threading.Event()

    @y.on_message
    def handle(message):
        y.close()
        closed.set()

    with pytest.raises(Closed, match="y went away"):
        x.call("y", b"", timeout_s=WAIT_S)
    assert closed.wait(WAIT_S)


def test_close_drops_what_has_not_begun_and_waits_for_what_runs(hub):
    x, y = hub.client("x"), hub.client("y", workers=1)
    started, done = threading.Event(), []

    @y.on_message(concurrent=True)
    def handle(message):
        started.set()
        with contextlib.suppress(Closed):
            y.call("y", b"", timeout_s=WAIT_S) if message.sender == "y" else x_left.wait(WAIT_S)
        done.append(message.data)

    x_left = threading.Event()
    x.send_nowait("y", b"first")
    assert started.wait(WAIT_S)
    x.send_nowait("y", b"second")
    x.close()
    x_left.set()
    y.close()
    assert done in ([b"first"], [b"first", b"second"])


def public(kind: type) -> dict[str, list[str]]:
    """Its methods and what they take, by name."""
    return {
        name: list(inspect.signature(member).parameters)
        for name, member in inspect.getmembers(kind, callable)
        if not name.startswith("_")
    }


@pytest.mark.parametrize(
    ("kind", "twin", "own"),
    [
        (blocking.Client, Client, {"close"}),
        (blocking.Room, Room, set()),
        (blocking.OwnState, OwnState, {"snapshot"}),
    ],
)
def test_it_has_what_the_asyncio_client_has(kind, twin, own):
    of_loops = {"aclose", "fileno", "on_frame", "on_lost", "on_restored", "on_welcome", "publish"}
    of_loops |= {"restore", "set_hubs"}
    of_agents = {"serve", "sleep", "unserve"}
    there, here = public(twin), public(kind)
    assert here.keys() - there.keys() == own
    assert there.keys() - here.keys() - of_loops - of_agents == set()
    for name in here.keys() & there.keys():
        assert set(here[name]) >= set(there[name]), name
