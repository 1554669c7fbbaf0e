"""What `tabane show` tells of an app, beside what all commands tell."""

from __future__ import annotations

import pytest
from tests.tools.answers import APP, INSTANCE, WAKE
from tests.tools.conftest import Pretended, Run, reply

SHOWN = {key: [] for key in ("advice", "instances", "homes", "wakes", "events")}
VOLUME = {"name": "data", "path": "/srv", "size": "1GiB"}


def test_an_instance_is_as_old_as_its_node_says(tabane: Run, pretended: Pretended) -> None:
    """Whatever the time is here."""
    told = {"app": APP, "instances": [INSTANCE | {"age_s": 3723.9}], "silent": []}
    pretended.begin(tokyo=reply(SHOWN | told))
    assert " 1h02m " in tabane("show", "hello").out


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


def test_class_and_trust_that_were_chosen_are_shown(tabane: Run, pretended: Pretended) -> None:
    """Of an app of class `auto` it is the instances that have them."""
    instance = INSTANCE | {"isolation": "sandbox", "driver": "runsc", "trust": "anonymous"}
    told = {"app": APP, "instances": [instance], "wakes": [WAKE | {"trust": "trusted"}]}
    pretended.begin(tokyo=reply(SHOWN | told | {"silent": []}))
    lines = [line.split() for line in tabane("show", "hello").out.splitlines()]
    assert ["sandbox", "runsc", "anonymous"] in [line[5:8] for line in lines]
    assert "trusted" in [line[2] for line in lines if len(line) > 2]
