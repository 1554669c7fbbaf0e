"""The file that says what a node collects."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabane.errors import SpecError
from tabane.k2i.collectors.file import load_collects
from tabane.model import Collect

WHOLE = """
[[collect]]
kind = "nginx"
url = "http://127.0.0.1:8080/status"
interval = "5s"
deadline = "500ms"

[[collect]]
name = "cache"
kind = "redis"
url = "unix:///run/redis/redis.sock"
username = "k2i"
password_file = "/etc/k2i/redis"

[[collect]]
kind = "command"
command = ["/usr/lib/k2i/temperature", "--all"]

[[collect]]
kind = "weather"
settings = { place = "north" }
"""


def test_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "collect.toml"
    path.write_text(WHOLE)
    assert load_collects(path) == (
        Collect("nginx", url="http://127.0.0.1:8080/status", interval_s=5, deadline_s=0.5),
        Collect(
            "redis",
            name="cache",
            url="unix:///run/redis/redis.sock",
            username="k2i",
            password_file="/etc/k2i/redis",
        ),
        Collect("command", command=("/usr/lib/k2i/temperature", "--all")),
        Collect("weather", settings={"place": "north"}),
    )


def test_an_empty_one_asks_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "collect.toml"
    path.write_text("")
    assert load_collects(path) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[collect]]\n", ":1: collect[1].kind: is missing"),
        ('[collect]\nkind = "nginx"\n', ":1: collect: "),
        (WHOLE + '[[collect]]\nkind = "nginx"\nuri = "x"\n', ":24: collect[5].uri: there is no"),
        ('[[collect]]\nkind = "nginx"\n', ":1: collect[1].url: is missing"),
        ('[[collect]]\nkind = "redis"\nurl = "http://x/"\n', ":3: collect[1].url: redis is asked"),
        ('[[collect]]\nkind = "nginx"\nurl = "http://u:p@x/"\n', "without user and password"),
        ('[[collect]]\nkind = "nginx"\nurl = "http://x:0/"\n', "is none of"),
        ('[[collect]]\nkind = "nginx"\nurl = "http://x:99999/"\n', "is none of"),
        ('[[collect]]\nkind = "nginx"\nurl = "http://x/\\r\\nHost: y"\n', "is none of"),
        ('[[collect]]\nkind = "redis"\nurl = "redis://x/0"\n', "is none of"),
        ('[[collect]]\nkind = "command"\n', "collect[1].command: is missing"),
        (
            '[[collect]]\nkind = "command"\ncommand = ["x"]\nurl = "http://x"\n',
            ":4: collect[1].url: has no meaning for command",
        ),
        (
            '[[collect]]\nkind = "x"\ninterval = "1s"\ndeadline = "2s"\n',
            ":4: collect[1].deadline: is longer than the interval",
        ),
        ('[[collect]]\nkind = "x"\ninterval = "10ms"\n', "is not from 1s to 1d"),
        ('[[collect]]\nkind = "x"\n[[collect]]\nkind = "x"\n', "collect[2].name: another one"),
        ("collect = 3", "write [[collect]]"),
        ("[[colect]]", "did you mean collect?"),
        ("x = ", "this is not TOML"),
    ],
)
def test_mistakes_are_said_with_their_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "collect.toml"
    path.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_collects(path)
    assert caught.value.message.startswith(str(path))
    assert said in caught.value.message


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        load_collects(tmp_path / "none.toml")
