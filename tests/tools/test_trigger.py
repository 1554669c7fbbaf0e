"""`tabane trigger ls`."""

from __future__ import annotations

import pytest
from tests.tools.answers import TRIGGER
from tests.tools.conftest import Pretended, Run, reply


@pytest.mark.parametrize(
    ("row", "when"),
    [
        ({"cron": "0 3 * * *", "timezone": "UTC"}, "0 3 * * *"),
        ({"cron": "0 3 * * *", "timezone": "Europe/Berlin"}, "0 3 * * * Europe/Berlin"),
        ({"cron": "", "room": "orders"}, "room orders"),
    ],
)
def test_when_is_what_the_file_says(
    tabane: Run, pretended: Pretended, row: dict[str, str], when: str
) -> None:
    """The next moment beside it is in the time of who reads it."""
    one = TRIGGER | {"name": "nightly", "request": "POST /clean-up"} | row
    pretended.begin(tokyo=reply({"triggers": [one]}))
    assert f"  {when}  POST /clean-up  " in tabane("trigger", "ls").out
