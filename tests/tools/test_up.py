import pytest

from tabane.node.cluster import Shape
from tabane.tools.cli.cluster import _say_left_out

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
