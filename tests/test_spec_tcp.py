"""`[[tcp]]` in app files."""

from __future__ import annotations

import pytest

from tabane.errors import SpecError
from tabane.model import App, TcpPort
from tabane.node import config
from tabane.spec import parse_app, read_app, render_app
from tabane.spec_fields import RESERVED_PORTS

HEAD = 'name = "a"\nimage = "host"\ncommand = ["b"]\n'


def parse(text: str) -> App:
    return parse_app(HEAD + text)


def test_a_port_leads_to_itself_unless_told() -> None:
    app = parse("[[tcp]]\nport = 2525\n[[tcp]]\nport = 5870\ntarget = 587\n")
    assert app.tcp == (TcpPort(2525, 2525), TcpPort(5870, 587))
    assert app.listens == (2525, 587)
    assert app.takes_sessions
    assert app.reactive.ready == "listen"


def test_all_that_may_be_said_is_read_and_shown() -> None:
    text = 'port = 6000\n[[tcp]]\nport = 25\nsession_idle = "5m"\nproxy_protocol = "v2"\n'
    app = parse(text)
    assert app.tcp == (TcpPort(25, 25, 300.0, "v2"),)
    assert app.listens == (6000, 25)
    assert read_app(render_app(app)) == app


def test_what_http_needs_a_tcp_port_does_not_replace() -> None:
    for text in ('hosts = ["a.test"]', '[reactive]\nready = "http:/"'):
        with pytest.raises(SpecError, match="port: is missing"):
            parse(f"{text}\n[[tcp]]\nport = 2525\n")


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("target = 25", "port", "is missing"),
        ("port = 0", "port", "is not a whole number from 1 to 65535"),
        ("port = 80", "port", "80 is for HTTP on every node"),
        ("port = 7070", "port", "7070 is for the control API"),
        ("port = 2525\ntarget = 65536", "target", "is not a whole number"),
        ('port = 2525\nsession_idle = "0s"', "session_idle", "is not longer than nothing"),
        ('port = 2525\nproxy_protocol = "v3"', "proxy_protocol", 'is none of "v1", "v2"'),
        ("port = 2525\nudp = true", "udp", "there is no such field"),
    ],
)
def test_mistakes_are_said_with_their_place(text: str, field: str, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(f"[[tcp]]\n{text}\n")
    assert caught.value.field == f"tcp[1].{field}"
    assert problem in caught.value.problem
    assert caught.value.line >= 4


def test_a_port_stands_there_once() -> None:
    with pytest.raises(SpecError, match=r"tcp\[2\]\.port: another one is called 2525"):
        parse("[[tcp]]\nport = 2525\n[[tcp]]\nport = 2525\ntarget = 25\n")


def test_what_nodes_listen_on_is_reserved() -> None:
    own = {value for name, value in vars(config).items() if name.endswith("_PORT")}
    assert own <= RESERVED_PORTS.keys()
