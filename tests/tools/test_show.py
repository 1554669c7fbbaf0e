"""What `tabane show` tells of an app, beside what all commands tell."""

from __future__ import annotations

import pytest
from tests.tools.answers import APP
from tests.tools.conftest import Pretended, Run, reply

SHOWN = {key: [] for key in ("advice", "instances", "homes", "wakes", "events")}
VOLUME = {"name": "data", "path": "/srv", "size": "1GiB"}


@pytest.mark.parametrize(
    ("silent", "end"), [([], ""), (["osaka/osaka-1"], ", which does not answer")]
)
def test_volumes_are_shown_with_their_node(
    tabane: Run, pretended: Pretended, silent: list[str], end: str
) -> None:
    app = APP | {"volumes": [VOLUME], "volumes_on": "osaka/osaka-1"}
    pretended.begin(tokyo=reply(SHOWN | {"app": app, "silent": silent}))
    shown = tabane("show", "hello")
    assert f"\n  volume    data at /srv, 1GiB, on osaka/osaka-1{end}\n" in shown.out
    assert shown.code == len(silent)
