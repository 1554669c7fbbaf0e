from argparse import Namespace

import pytest

from tabane.node.cluster import Shape
from tabane.tools.cli.cluster import _say_left_out, _shape_of

THREE = Shape(["tokyo", "osaka", "ishikari"], 2, 1, "")


@pytest.mark.parametrize(
    ("shape", "nodes"),
    [
        (THREE, ""),
        (THREE._replace(datacenters=["tokyo", "osaka", "ishikari", "naha"], nodes=3), ""),
        (
            THREE._replace(datacenters=["tokyo", "osaka"]),
            "ishikari/ishikari-1, ishikari/ishikari-2",
        ),
        (
            THREE._replace(datacenters=["tokyo", "naha"], nodes=1),
            "tokyo/tokyo-2, osaka/osaka-1, osaka/osaka-2, ishikari/ishikari-1, ishikari/ishikari-2",
        ),
    ],
)
def test_a_smaller_cluster_than_before_is_said(
    shape: Shape, nodes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _say_left_out(THREE, shape)
    out, err = capsys.readouterr()
    assert out == ""
    if nodes:
        assert err.startswith(f"tabane: up: without {nodes}, which the cluster had before: ")
        assert "`tabane up --datacenters tokyo,osaka,ishikari --nodes 2`" in err
    else:
        assert err == ""


def test_a_new_cluster_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    _say_left_out(None, THREE)
    assert capsys.readouterr().err == ""


def test_what_is_not_said_stays_as_it_was() -> None:
    before = THREE._replace(allow_emulation=True, image_quota_bytes=5 << 30)
    said = dict.fromkeys(("datacenters", "nodes", "gateways", "driver", "allow_emulation"))
    said |= dict.fromkeys(("checkpoint_quota", "checkpoint_memory", "memory"))
    assert _shape_of(Namespace(**said, image_quota=None), before) == before
    smaller = _shape_of(Namespace(**said, image_quota=1 << 30), before)
    assert smaller == before._replace(image_quota_bytes=1 << 30)
    assert _shape_of(Namespace(**said, image_quota=0), before).image_quota_bytes == 0
    said |= {"checkpoint_quota": 2 << 30, "checkpoint_memory": 1 << 30, "memory": 4 << 30}
    shape = _shape_of(Namespace(**said, image_quota=None), before)
    assert (shape.checkpoint_quota_bytes, shape.checkpoint_memory_bytes) == (2 << 30, 1 << 30)
    assert shape.memory_bytes == 4 << 30
