"""What app files say of checks and triggers."""

from __future__ import annotations

import pytest

from tabane.errors import SpecError
from tabane.reactions import Health, Trigger
from tabane.spec import parse_app, read_app, render_app

LEAST = 'name = "a"\nimage = "host"\ncommand = ["true"]\n'


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_app(text, file="a.toml")
    return caught.value


def test_health() -> None:
    said = 'http = "/ok?a=b"\ninterval = "20s"\ntimeout = "1s"\nfailures = 5\nstartup = "1m"\n'
    app = parse_app(f'{LEAST}port = 1\nreactive.ready = "health"\n[health]\n{said}')
    assert app.health == Health("/ok?a=b", False, (), 20.0, 1.0, 5, 60.0)
    assert app.reactive.ready == "health"
    assert parse_app(f"{LEAST}health.command = ['true']").health.asks == "`true`"
    assert read_app(render_app(app)) == app


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("port = 1\nhealth.http = 'ok'", "health.http", "no path of a URL"),
        ("port = 1\nhealth.http = '/'\nhealth.tcp = true", "health.tcp", "beside http"),
        ("port = 1\nhealth.failures = 2", "health", "says no check"),
        ("health.tcp = true", "health.tcp", "needs a port"),
        ("port = 1\nprotocol = 'h2c'\nhealth.http = '/'", "health.http", "use tcp"),
        ("port = 1\nhealth.tcp = true\nhealth.timeout = '11s'", "health.timeout", "shorten it"),
        ("port = 1\nreactive.ready = 'health'", "reactive.ready", "no check is in [health]"),
    ],
)
def test_health_is_one_check_that_can_be_made(text: str, field: str, words: str) -> None:
    error = refusal(LEAST + text)
    assert error.field == field
    assert words in error.message


def test_triggers() -> None:
    cron = '[[triggers]]\ncron = "0 3 * * *"\ntimezone = "Europe/Berlin"\nmissed = "once"\n'
    room = '[[triggers]]\nname = "order"\nroom = "orders"\npath = "/orders"\n'
    app = parse_app(f"{LEAST}port = 1\n{cron}{room}")
    assert app.triggers == (
        Trigger(cron="0 3 * * *", timezone="Europe/Berlin", missed="once"),
        Trigger("order", room="orders", path="/orders"),
    )
    assert [trigger.key for trigger in app.triggers] == ["cron", "order"]
    assert read_app(render_app(app)) == app


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("", "cron", "is missing, or room"),
        ('cron = "@hourly"\nroom = "a"', "room", "beside cron: leave one"),
        ('cron = "@often"', "cron", "is not five fields"),
        ('cron = "0 0 31 2 *"', "cron", "no line of a crontab"),
        ('cron = "@daily"\ntimezone = "Mars"', "timezone", "no time zone"),
        ('cron = "@daily"\nmissed = "all"', "missed", "none of skip, once"),
        ('cron = "@daily"\nmethod = "BREW"', "method", "is none of"),
        ('cron = "@daily"\npath = "x"', "path", "no path of a URL"),
        ('room = "a.*"', "room", "name one"),
        ('room = "nodes"', "room", "own processes"),
        ('room = "a"\noverlap = "allow"', "overlap", "with cron only"),
    ],
)
def test_a_trigger_is_one_moment_or_room(text: str, field: str, words: str) -> None:
    error = refusal(f"{LEAST}port = 1\n[[triggers]]\n{text}\n")
    assert error.field == f"triggers[1].{field}"
    assert words in error.message


def test_a_room_has_one_trigger() -> None:
    twice = '[[triggers]]\nname = "%d"\nroom = "a"\n'
    error = refusal(f"{LEAST}port = 1\n{twice % 1}{twice % 2}")
    assert (error.field, error.line) == ("triggers[2].room", 10)


def test_a_trigger_needs_a_port() -> None:
    assert refusal(f'{LEAST}[[triggers]]\ncron = "@daily"\n').field == "port"


def test_resources_that_follow_sessions() -> None:
    app = parse_app(f'{LEAST}port = 1\nresources.cpu_min = 0.1\nresources.memory_min = "32MiB"')
    assert (app.resources.cpu_min, app.resources.memory_min_bytes) == (0.1, 32 << 20)
    assert app.resources.follow
    assert not parse_app(LEAST).resources.follow
    assert read_app(render_app(app)) == app


@pytest.mark.parametrize(
    ("text", "field", "words"),
    [
        ("port = 1\nresources.cpu_min = 2", "resources.cpu_min", "is more than cpu"),
        ("port = 1\nresources.memory_min = '1GiB'", "resources.memory_min", "more than memory"),
        ("resources.cpu_min = 0.5", "resources.cpu_min", "needs a port"),
    ],
)
def test_bounds_that_cannot_be(text: str, field: str, words: str) -> None:
    error = refusal(LEAST + text)
    assert error.field == field
    assert words in error.message
