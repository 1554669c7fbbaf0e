from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.tools.conftest import Pretended, reply

from tabane import errors
from tabane.clock import SYSTEM
from tabane.spec_readers import Mistake
from tabane.tools import client
from tabane.tools.client import Cluster

WHOLE = reply({"of": "whole"})


def test_the_next_node_is_asked_when_one_is_down(pretended: Pretended) -> None:
    pretended.begin(tokyo=b"", osaka=WHOLE)
    cluster = Cluster(pretended.root)
    assert cluster.get("/x") == {"of": "whole"}
    assert cluster.post("/x", {"a": 1}) == {"of": "whole"}
    assert pretended.nodes["osaka"].asked == [("GET /x", b""), ("POST /x", b'{"a": 1}')]


@pytest.mark.parametrize("length", range(len(WHOLE)))
def test_an_answer_that_breaks_off_anywhere_is_none(pretended: Pretended, length: int) -> None:
    pretended.begin(tokyo=WHOLE[:length] or b"\r\n", osaka=reply({"of": "osaka"}))
    assert Cluster(pretended.root).get("/x") == {"of": "osaka"}
    assert len(pretended.nodes["tokyo"].asked) == 1


@pytest.mark.parametrize(
    "answer", [b"garbage\r\n\r\n", b"HTTP/1.1 x OK\r\n\r\n{}", b"HTTP/1.1 200 OK\r\n\r\n{}"]
)
def test_what_does_not_say_its_length_is_no_answer(pretended: Pretended, answer: bytes) -> None:
    pretended.begin(tokyo=answer)
    with pytest.raises(errors.Unreachable, match=r"tokyo/tokyo-1: it broke off"):
        Cluster(pretended.root).get("/x")


@pytest.mark.parametrize("ask", [Cluster.get, Cluster.post, Cluster.delete])
def test_a_node_that_hangs_is_sent_nothing_and_asked_last_for_a_while(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Cluster, str], object]
) -> None:
    monkeypatch.setattr(client, "ALIVE_S", 0.05)
    pretended.begin(tokyo=None, osaka=WHOLE)
    assert ask(Cluster(pretended.root), "/x") == {"of": "whole"}
    assert pretended.nodes["tokyo"].asked == [("GET /", b"")]
    assert ask(Cluster(pretended.root), "/x") == {"of": "whole"}  # as the next command does
    assert len(pretended.nodes["tokyo"].asked) == 1
    mark = pretended.root / "nodes/tokyo/tokyo-1/hung"
    os.utime(mark, times=(0, SYSTEM.wall() - client.HUNG_S))
    assert ask(Cluster(pretended.root), "/x") == {"of": "whole"}
    assert len(pretended.nodes["tokyo"].asked) == 2


def test_a_node_that_is_named_may_take_its_time(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "QUESTION_TIMEOUT_S", 0.05)
    pretended.begin(tokyo=None, osaka=WHOLE)
    with pytest.raises(errors.Unreachable, match=r"\(tokyo/tokyo-1: timed out\)"):
        Cluster(pretended.root).get("/x", node="tokyo-1")
    assert [line for line, _ in pretended.nodes["tokyo"].asked] == ["GET /x"]


def test_nodes_that_are_only_slow_are_asked_all_the_same(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_both_slow(path: Path, target: str, timeout_s: float) -> tuple[int, bytes]:
        if timeout_s == client.ALIVE_S:
            raise TimeoutError
        return 200, path.parent.name.encode()

    pretended.begin(tokyo=WHOLE, osaka=WHOLE)
    monkeypatch.setattr(client, "ask", with_both_slow)
    assert Cluster(pretended.root).get_bytes("/x") == b"tokyo-1"


def test_who_may_not_note_that_a_node_hangs_asks_all_the_same(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(client, "ALIVE_S", 0.05)
    monkeypatch.setattr(Path, "touch", refuse)
    pretended.begin(tokyo=None, osaka=WHOLE)
    assert Cluster(pretended.root).get("/x") == {"of": "whole"}


def test_the_deadline_is_for_the_whole_answer(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go_on_and_on(line: str, body: bytes) -> Iterator[bytes]:
        while True:
            yield b"x"

    monkeypatch.setattr(client, "QUESTION_TIMEOUT_S", 0.05)
    pretended.begin(tokyo=go_on_and_on)
    with pytest.raises(errors.Unreachable, match="tokyo/tokyo-1: timed out"):
        Cluster(pretended.root).get("/x")


def test_all_who_do_not_answer_are_named(pretended: Pretended) -> None:
    pretended.begin(tokyo=b"", osaka=b"no\r\n\r\n", ishikari=b"")
    with pytest.raises(errors.Unreachable) as caught:
        Cluster(pretended.root).get("/x")
    assert "tokyo/tokyo-1: No such file" in caught.value.message
    assert "osaka/osaka-1: it broke off" in caught.value.message
    assert "ishikari/ishikari-1: No such file" in caught.value.message


def test_a_node_may_be_named_with_its_data_center_or_without(pretended: Pretended) -> None:
    pretended.begin(tokyo=WHOLE, osaka=reply("osaka"))
    cluster = Cluster(pretended.root)
    assert cluster.get("/x", node="osaka-1") == cluster.get("/x", node="osaka/osaka-1") == "osaka"
    assert pretended.nodes["tokyo"].asked == []


@pytest.mark.parametrize("node", ["", "nara", "tokyo", "../tokyo/tokyo-1", "tokyo/tokyo-1/"])
def test_nodes_that_are_not_there(pretended: Pretended, node: str) -> None:
    pretended.begin(tokyo=WHOLE)
    for ask in (Cluster(pretended.root).get, Cluster(pretended.root).post):
        with pytest.raises(errors.NotFound, match="only tokyo/tokyo-1"):
            ask("/x", node=node)


def test_paths_may_be_longer_than_a_socket_address(tmp_path: Path) -> None:
    root = tmp_path / ("long" * 50)
    root.mkdir()
    deep = Pretended(root)
    deep.begin(tokyo=WHOLE)
    try:
        assert Cluster(root).get("/x") == Cluster(root).post("/x") == {"of": "whole"}
    finally:
        deep.close()


def test_a_socket_that_others_may_not_use(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied", "somewhere")

    pretended.begin(tokyo=WHOLE)
    cluster = Cluster(pretended.root)
    monkeypatch.setattr(client, "connect_unix", refuse)
    with pytest.raises(errors.Unreachable, match=r"tokyo/tokyo-1: Permission denied"):
        cluster.get("/x")
    with pytest.raises(errors.Unreachable, match=r"tokyo/tokyo-1: Permission denied"):
        cluster.post("/x")


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (404, {"error": "not_found", "message": "no such"}, errors.NotFound, "no such"),
        (409, {"error": "conflict", "message": "m"}, errors.Conflict, "m"),
        (410, {"error": "stale", "message": "m"}, errors.Stale, "m"),
        (403, {"error": "denied", "message": "m"}, errors.Denied, "m"),
        (400, {"error": "spec", "message": "f:1: m", "line": 1}, errors.UsageError, "f:1: m"),
        (503, {"error": "unreachable", "message": "m"}, errors.Unreachable, "m"),
        (400, {"error": "usage", "message": "m"}, errors.UsageError, "m"),
        (429, {"error": "busy", "message": "m"}, errors.Busy, "m"),
        (500, {"error": "engine", "message": "m"}, errors.EngineError, "m"),
        (500, {"error": "made-up", "message": "m"}, errors.Refused, "m"),
        (500, {"error": ["no", "word"], "message": None}, errors.Refused, "answered 500"),
        (405, {"detail": "Method Not Allowed"}, errors.Refused, "answered 405"),
        (500, b"Internal Server Error", errors.Refused, "answered 500"),
        (500, b"", errors.Refused, "answered 500"),
        (502, b"\xff\xfe", errors.Refused, "answered 502"),
        (500, [1, 2], errors.Refused, "answered 500"),
        (500, b"null", errors.Refused, "answered 500"),
        (307, b"", errors.Refused, "answered 307"),
        (200, b"", errors.ProtocolError, "not JSON"),
        (200, b'{"half":', errors.ProtocolError, "not JSON"),
    ],
)
def test_errors_come_back_as_they_were_raised(
    pretended: Pretended, status: int, body: object, kind: type[Exception], message: str
) -> None:
    assert issubclass(Mistake, errors.UsageError)  # which has no word of its own
    pretended.begin(tokyo=reply(body, status), osaka=WHOLE)
    cluster = Cluster(pretended.root)
    for ask in (cluster.get, cluster.post, cluster.delete):
        with pytest.raises(errors.TabaneError, match=message) as caught:
            ask("/x")
        assert type(caught.value) is kind
    assert pretended.nodes["osaka"].asked == []


def test_odd_names_stay_one_word_of_the_request(pretended: Pretended) -> None:
    pretended.begin(tokyo=WHOLE)
    cluster = Cluster(pretended.root)
    for ask in (cluster.get, cluster.post, cluster.delete):
        ask("/apps/a b\r\nX: y/束\udcff?n=1")
    quoted = "/apps/a%20b%0D%0AX:%20y/%E6%9D%9F%FF?n=1"
    lines = [line for line, _ in pretended.nodes["tokyo"].asked]
    assert lines == [f"GET {quoted}", f"POST {quoted}", f"DELETE {quoted}"]


@pytest.mark.parametrize(
    "answer", [b"\r\n", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"]
)
def test_an_action_that_breaks_off_is_not_tried_elsewhere(
    pretended: Pretended, answer: bytes
) -> None:
    pretended.begin(tokyo=answer, osaka=WHOLE)
    with pytest.raises(errors.Unreachable, match="tokyo/tokyo-1 did not say whether it was done: "):
        Cluster(pretended.root).post("/x")
    assert pretended.nodes["osaka"].asked == []


def test_an_action_that_hangs_costs_its_deadline(pretended: Pretended) -> None:
    pretended.begin(tokyo=None)
    said = "tokyo/tokyo-1 did not say whether it was done: timed out"
    with pytest.raises(errors.Unreachable, match=said):
        Cluster(pretended.root).post("/x", timeout_s=0.05)


def test_a_refusal_before_the_whole_body_was_read_is_heard(pretended: Pretended) -> None:
    """The node's side of the connection closes while most of the body is still to be sent."""
    pretended.begin(tokyo=reply({"error": "denied", "message": "too much"}, 403))
    blocks = iter([b"x" * (1 << 16)] * 1000)
    with pytest.raises(errors.Denied, match="too much"):
        Cluster(pretended.root).request("POST", "/x", blocks)


def chunked(*blocks: bytes) -> bytes:
    parts = [b"%x\r\n%s\r\n" % (len(block), block) for block in blocks]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(parts)


def test_lines_come_whole_however_they_were_cut(pretended: Pretended) -> None:
    pretended.begin(tokyo=chunked(b"on", b"e\ntwo\n\nth", b"ree") + b"0\r\n\r\n")
    with Cluster(pretended.root).stream("/x") as lines:
        assert list(lines) == [b"one\n", b"two\n", b"\n", b"three"]


@pytest.mark.parametrize("end", [b"", b"5\r\nab", b"5", b"\r\n", b"x\r\n"])
def test_a_stream_that_breaks_off_is_not_taken_for_its_end(
    pretended: Pretended, end: bytes
) -> None:
    pretended.begin(tokyo=chunked(b"one\n") + end)
    with Cluster(pretended.root).stream("/x") as lines:
        assert next(lines) == b"one\n"
        with pytest.raises(errors.Unreachable, match="tokyo/tokyo-1 broke off") as caught:
            list(lines)
        assert "IncompleteRead" not in caught.value.message


def test_a_stream_that_is_refused(pretended: Pretended) -> None:
    pretended.begin(tokyo=reply({"error": "not_found", "message": "no such log"}, 404))
    with (
        pytest.raises(errors.NotFound, match="no such log"),
        Cluster(pretended.root).stream("/x"),
    ):
        pass


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"nodes": 5}', b'{"nodes": [{}]}', b"\xff"]
)
def test_a_file_that_describes_no_cluster(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cluster.json").write_bytes(content)
    with pytest.raises(errors.Corrupt, match=r"cluster\.json does not describe a cluster"):
        Cluster(tmp_path)


def test_where_clusters_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("TABANE_ROOT", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert client.default_root() == Path.home() / ".local/state/tabane"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert client.default_root() == Path("/state/tabane")
    monkeypatch.setenv("TABANE_ROOT", "/here")
    assert client.default_root() == Path("/here")
