"""Names of processes, as people write them and as messages carry them."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import UsageError
from tabane.k2i import orders
from tabane.k2i.orders import Gpid, Limit, Order, name_of, parse_gpid, parse_signal

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True)
PIDS = st.integers(1, orders.MAX_PID)
ACTIONS: list[orders.Action] = [
    orders.Signal(15),
    orders.Nice(-5, relative=True),
    orders.Affinity((0, 1)),
    orders.Limits({"nofile": Limit(10, None)}),
    orders.Pause(),
    orders.Resume(),
]


@given(NAMES, NAMES, PIDS)
def test_what_is_written_is_read(dc: str, node: str, pid: int) -> None:
    gpid = Gpid(dc, node, "", pid, 0)
    assert str(gpid) == f"{dc}/{node}:{pid}"
    assert parse_gpid(str(gpid)) == gpid
    assert gpid.place == f"{dc}/{node}"


@given(PIDS)
def test_outside_of_a_cluster_a_pid_is_enough(pid: int) -> None:
    gpid = Gpid("", "", "", pid, 0)
    assert (str(gpid), gpid.place) == (str(pid), "")
    assert parse_gpid(str(pid)) == gpid


@pytest.mark.parametrize(
    "text",
    [
        *("", "0", "-1", "+5", "4194305", "1 ", " 1", "1\n", "٣", "1e3", "99999999999999999999"),
        *("tokyo:1", "tokyo/:1", "/tokyo-1:1", "tokyo/tokyo-1", "tokyo/tokyo-1:", "a/b/c:1"),
        *("Tokyo/tokyo-1:1", "a/b:0", "a/b:-1", "a-/b:1", "../b:1", "a/b:1:2"),
    ],
)
def test_what_names_no_process_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no process: write DATACENTER/NODE:PID"):
        parse_gpid(text)


def test_only_one_that_was_looked_up_is_safe() -> None:
    assert not parse_gpid("tokyo/tokyo-1:5").is_safe
    assert not Gpid("tokyo", "tokyo-1", "i", 5, 0).is_safe
    assert Gpid("tokyo", "tokyo-1", "i", 5, 7).is_safe


@pytest.mark.parametrize("action", ACTIONS, ids=name_of)
def test_orders_survive_the_wire(action: orders.Action) -> None:
    order = Order((Gpid("a", "b", "i", 5, 7),), action, dry_run=True, force=True, key="k")
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(order), type=Order) == order


def test_actions_have_names() -> None:
    names = ["signal", "nice", "affinity", "limits", "pause", "resume"]
    assert [name_of(action) for action in ACTIONS] == names


@pytest.mark.parametrize(
    ("action", "text"),
    [
        (orders.Affinity((8, 0, 1, 2, 3, 1)), "affinity 0-3,8"),
        (orders.Affinity((5,)), "affinity 5"),
        (orders.Affinity(tuple(range(0, 8192, 2))), "affinity 0,2,4"),
        (orders.Limits({"x" * 100_000: orders.Limit()}), "limits xxx"),
    ],
)
def test_nobody_can_make_long_lines(action: orders.Action, text: str) -> None:
    described = orders.describe(action)
    assert described.startswith(text)
    assert len(described) <= orders.MOST_TEXT + 3


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("TERM", 15), ("SIGTERM", 15), ("term", 15), ("15", 15), ("0", 0), ("9", 9)),
        *(("RTMIN", 34), ("RTMIN+3", 37), ("SIGRTMAX-1", 63), ("rtmax", 64)),
    ],
)
def test_signals_have_names_and_numbers(text: str, number: int) -> None:
    assert parse_signal(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "SIG", "TERMINATE", "-1", "65", "RTMIN-3", "RTMIN+99", "TERM+1", "1.5", "٣", "9" * 5000],
)
def test_other_words_are_no_signals(text: str) -> None:
    with pytest.raises(UsageError, match="is no signal: write its name or number"):
        parse_signal(text)
