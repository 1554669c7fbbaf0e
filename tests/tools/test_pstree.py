"""tabane pstree, and the trees it is drawn from; how it agrees with pstree itself is tested in
test_ps_oracle.py."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tools.conftest import EVIL, Pretended, Run, check_refusal
from tests.tools.rows import HOST, ROW
from tests.tools.test_ps import answer

from tabane.tools.cli.drawing import Knot, draw_across, draw_down, tie
from tabane.tools.cli.trees import flatten, forest_prefix, grow


def process(pid: int, ppid: int, name: str, **fields: Any) -> dict[str, Any]:
    return HOST | {"pid": pid, "ppid": ppid, "name": name, "command": f"{name} -x"} | fields


FAMILY = [
    process(1, 0, "init"),
    process(2, 1, "sh"),
    process(3, 2, "cat", uid=33, user="www-data"),
    process(4, 1, "httpd", **{k: ROW[k] for k in ("app", "instance", "class")}),
    process(5, 4, "httpd", **{k: ROW[k] for k in ("app", "instance", "class")}),
    process(6, 1, "sh"),
    process(7, 6, "cat", uid=33, user="www-data"),
]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (
            [],
            "osaka/osaka-1---init-+-httpd[hello,container]---httpd\n"
            "                     `-2*[sh---cat]\n",
        ),
        (
            ["-p", "-u"],
            "osaka/osaka-1---init(1)-+-httpd(4)[hello,container]---httpd(5)\n"
            "                        |-sh(2)---cat(3,www-data)\n"
            "                        `-sh(6)---cat(7,www-data)\n",
        ),
        (
            ["-ap", "4"],
            "osaka/osaka-1\n  `-httpd,4[hello,container] -x\n      `-httpd,5 -x\n",
        ),
        (["2"], "osaka/osaka-1---sh---cat\n"),
        (["osaka/osaka-1:2"], "osaka/osaka-1---sh---cat\n"),
        (["abc123"], "osaka/osaka-1---httpd[hello,container]---httpd\n"),
        (["www-data"], "osaka/osaka-1---2*[cat]\n"),
        (["-s", "3"], "osaka/osaka-1---init---sh---cat\n"),
        (["-U", "2"], "osaka/osaka-1───sh───cat\n"),
    ],
)
def test_drawings(argv: list[str], shown: str, tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(*FAMILY))
    assert tabane("pstree", *argv) == (0, shown, "")
    assert len(pretended.nodes["tokyo"].asked) == 1


def test_each_node_has_its_own(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(process(1, 0, "init"), ROW, silent=("nara/nara-1",)))
    ended = tabane("pstree")
    tokyo = "tokyo/tokyo-1---httpd[hello,container]\n"
    assert ended.out == f"osaka/osaka-1---init\n{tokyo}"
    assert (ended.code, ended.err) == (1, "tabane: no answer from nara/nara-1\n")


def test_json_has_depths(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(*FAMILY))
    rows = json.loads(tabane("pstree", "--json", "1").out)["processes"]
    assert [(row["pid"], row["depth"]) for row in rows][:3] == [(1, 0), (4, 1), (5, 2)]


def test_nothing_moves_the_cursor(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(process(1, 0, EVIL, user=EVIL), process(2, 1, EVIL)))
    for argv in ([], ["-a"], ["-pu"]):
        assert "\\x1b[2J" in tabane("pstree", *argv).out


def test_who_is_not_there(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(*FAMILY))
    check_refusal(tabane("pstree", "99"), 1, "99 is no process, no instance, and no process is")
    check_refusal(tabane("pstree", "nobody"), 1, "nobody is no process, no instance")


def test_a_chain_of_thousands() -> None:
    rows = [process(pid, pid - 1, "sh") for pid in range(1, 3001)]
    roots = grow(rows)
    drawn = draw_across(tie(roots, lambda branch, parent: "s", lambda branch: True)[0])
    assert drawn == ["---".join(["s"] * 3000)]
    assert len(draw_down(tie(roots, lambda branch, parent: "s", lambda branch: False)[0])) == 3000


PARENTS = st.lists(st.integers(0, 12), min_size=1, max_size=12)


@given(PARENTS, st.randoms(use_true_random=False))
def test_nobody_is_lost_whatever_the_parents_are(parents: list[int], dice: random.Random) -> None:
    """Also when they go round in a circle, as pids read at different moments can."""
    rows = [process(pid, ppid, "sh") for pid, ppid in enumerate(parents, 1)]
    dice.shuffle(rows)
    found = [row["pid"] for row, _ in flatten(grow(rows))]
    assert sorted(found) == sorted(row["pid"] for row in rows)
    depth = {row["pid"]: len(above) for row, above in flatten(grow(rows))}
    assert all(depth[row["pid"]] == depth[row["ppid"]] + 1 for row in rows if depth[row["pid"]] > 0)


def test_what_is_inside_has_pids_of_its_own() -> None:
    rows = [process(1, 0, "init"), process(1, 0, "app", inside="guest", instance="a"),
            process(2, 1, "sh", inside="guest", instance="a"), process(2, 1, "host")]  # fmt: skip
    drawn = [(row["name"], len(above)) for row, above in flatten(grow(rows))]
    assert drawn == [("init", 0), ("host", 1), ("app", 0), ("sh", 1)]


def test_forests_are_drawn_as_ps_does() -> None:
    rows = [process(1, 0, "a"), process(2, 1, "b"), process(3, 2, "c"), process(4, 1, "d")]
    drawn = [forest_prefix(above) + row["name"] for row, above in flatten(grow(rows))]
    assert drawn == ["a", r" \_ b", r" |   \_ c", r" \_ d"]


def test_brackets_around_equal_subtrees() -> None:
    leaf = Knot("c", [])
    root = Knot("a", [Knot("b", [leaf, Knot("d", [leaf], 2)], 3)])
    assert draw_across(root) == ["a---3*[b-+-c]", "         `-2*[d---c]]"]
