from __future__ import annotations

import pytest

from tabane.middlecon import MemberInfo, Reason, Receipt, Replies
from tabane.middlecon.measure import percentile
from tabane.middlecon.receipts import Cause
from tabane.middlecon.screen import (
    HubStats,
    RoomView,
    View,
    fit,
    one_line,
    printable,
    receipt_json,
    receipt_lines,
    table,
    view_json,
    view_lines,
)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain\n", "plain"),
        (b"two\nlines\n\n", "two\nlines\n"),
        (b"\x1b[31m\r\x00\x7f", "\\x1b[31m\\r\\x00\\x7f"),
        (b"\xff\xc3", "\\xff\\xc3"),
        ("日本\u202e".encode(), "日本\\u202e"),
        ("\udcff", "\\udcff"),
    ],
)
def test_text_moves_no_cursor(data, shown):
    assert printable(data) == shown
    assert one_line(b"a\tb\nc") == "a\\tb\\nc"


def test_a_receipt_names_everybody_who_was_not_reached():
    reason = Reason(Cause.REFUSED, "no\nbody", "stale")
    receipt = Receipt(("b", "a"), {"d": reason}, ("c",), ("e",), 2)
    assert receipt_lines(receipt) == [
        "2 of 5 acknowledged, 2 told in chat",
        "  c: unknown: the link to its hub died",
        "  d: refused: no\\nbody",
        "  e: asleep",
    ]
    assert receipt_json(receipt) == {
        "complete": False,
        "acknowledged": ["a", "b"],
        "failed": {"d": {"cause": "refused", "text": "no\nbody", "code": "stale"}},
        "unknown": ["c"],
        "asleep": ["e"],
        "told": 2,
    }
    assert receipt_json(Replies(answers={"b": b"\xff", "a": b"x"}))["answers"] == {
        "a": "x",
        "b": {"base64": "/w=="},
    }


def make_view(at: float, heard: dict[str, int] | None, said: int | None = None, **options) -> View:
    members = {"x": MemberInfo("x", "a"), "y": MemberInfo("y", "b", known=False)}
    if said is not None:
        options["stats"] = HubStats(rooms={"r": 2, "s": 1}, messages={"r": said, "s": 3 * said})
    room = RoomView(members, {"x": {"k": b"v"}}, heard)
    return View(at, "a", rooms={"r": room}, **options)


def test_rates_are_differences_between_two_views():
    before = make_view(10.0, {"x": 5, "z": 1}, 100)
    after = make_view(12.0, {"x": 8, "y": 1, "z": 1}, 104)
    rows = [line.split() for line in view_lines(after, before, "12:00:00")]
    assert ["r", "2", "2.0"] in rows
    assert ["s", "1", "6.0"] in rows, "it is not followed"
    assert ["x", "r", "a", "1.5", "k=v"] in rows
    assert ["y", "r", "b", "(unknown)", "0.5"] in rows
    room = view_json(after, before)["rooms"]["r"]
    assert room["messages_per_s"] == 2.0 and room["members"]["y"]["known"] is False
    anew = make_view(10.0, None, 105)
    for earlier in (None, make_view(10.0, None), View(10.0, "a"), anew, after):
        assert view_json(after, earlier)["rooms"]["r"]["messages_per_s"] is None


def test_the_header_tells_of_the_hubs_sessions_and_of_trouble():
    stats = HubStats(1, {"r": 2, "s": 7}, {"b": 1234}, 3, 1234, {"b": 1, "c": 1})
    lines = view_lines(make_view(0, None, stats=stats, hubs={"b": True, "c": False}), None, "t")
    assert lines[0].endswith(
        "1 room, 2 members, 1 of 2 links open, 1 session, 3 pending, 1,234 bytes waiting, 2 dropped"
    )
    rows = [line.split() for line in lines]
    assert ["b", "open", "1,234", "bytes"] in rows and ["c", "down", "0", "bytes"] in rows
    assert ["r", "2", "-"] in rows and ["s", "7", "-"] in rows
    lost = view_lines(make_view(0, None, trouble="it said\ngoodbye"), None, "t")[0]
    assert lost == "middlecon - t, no session with hub a now: it said\\ngoodbye"


def test_columns_fit_wide_characters_and_lines_fit_the_screen():
    assert table(("A", "B"), [("東京", "1"), ("x", "2")]) == ["A     B", "東京  1", "x     2"]
    assert fit(["1", "2", "3"], 10, 3) == ["1", "2", "3"]
    assert fit(["1", "2", "3"], 10, 2) == ["1", "... 2 line"]
    assert fit(["東京都"], 5, 9) == ["東京 "]


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 5.0), (0.9, 9.0), (0.99, 10.0), (1.0, 10.0)]
)
def test_percentiles(share, value):
    assert percentile([float(number) for number in range(10, 0, -1)], share) == value
