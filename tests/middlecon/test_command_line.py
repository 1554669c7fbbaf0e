"""What may stand on middlecon's command line, and what is said of all else."""

from __future__ import annotations

import pytest

from tabane import __version__
from tabane.errors import UsageError
from tabane.middlecon import Hub
from tabane.middlecon.addresses import Tcp, parse_host_port
from tabane.middlecon.cli import _parse, main


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["bogus"], "there is no command 'bogus', only serve, join, say, ask, cast, state, top"),
        (["serve", "--listen", "foo"], "'foo' is no hub's address"),
        (["0.0.0.0:99999"], "is no address"),
        (["say"], "something is missing: write `middlecon say ROOM TEXT`"),
        (["say", "r", "t", "--timeout", "0"], "no time to wait"),
        (["say", "r", "t", "--timeout=-1"], "'-1' is no number of seconds"),
        (["say", "r", "t", "--timeout", "inf"], "'inf' is no number of seconds"),
        (["say", "r", "t", "--timeout", "2h"], "too long to wait"),
        (["say", "r", "t", "--timout", "2"], "no option --timout: did you mean --timeout?"),
        (["--bogus"], "no option --bogus: `middlecon --help` lists them"),
        (["ask", "r", "t", "--timeout", "nan"], "'nan' is no number of seconds"),
        (["ask", "r", "t", "--timeout", "soon"], "'soon' is no number of seconds"),
        (["say", "r\x07", "t"], "cannot be printed"),
        (["cast", "", "t"], "1 to 255 bytes"),
        (["say", "r", "t", "--name", ""], "1 to 255 bytes"),
        (["top", "r", "x" * 256], "1 to 255 bytes"),
        (["state", "r", "--member", "\n"], "cannot be printed"),
        (["serve", "--token-file", "/nonexistent"], "/nonexistent: No such file"),
        (["join", "r", "--put", "load"], "'load' is no KEY=VALUE"),
        (["join", "r", "--put", "=1"], "1 to 255 bytes"),
        (["join", "r", "--answer", "a", "--exec", "b"], "not allowed with argument"),
        (["top", "-n", "0"], "'0' is no number from 1"),
        (["top", "-n", "²"], "'²' is no number from 1"),
        (["bench", "--members", "99999"], "is no number from 1 to 9000"),
        (["bench", "--size=-1"], "is no number from 0 to 1048576"),
        (["serve", "--link", "b"], "'b' is no NAME=URL"),
        (["serve", "--link", "b=somewhere"], "'somewhere' is no hub's address"),
        (["serve", "--link", "=tcp://127.0.0.1:1"], "1 to 255 bytes"),
        (["serve", "--listen", "tcp://127.0.0.1:0", "--link", "hub=tcp://[::1]:1"], "is this one"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("-V", "--version"):
        with pytest.raises(SystemExit, match="0"):
            main([option])
        assert capsys.readouterr().out == f"middlecon {__version__}\n"


def test_seconds_may_have_a_unit() -> None:
    assert _parse(["say", "r", "t", "--timeout", "2"]).timeout == 2.0
    assert _parse(["say", "r", "t", "--timeout", "1m5s"]).timeout == 65.0


def test_bare_addresses_serve() -> None:
    assert _parse([]).listen == []
    assert _parse(["[::1]:5000"]).listen == ["tcp://[::1]:5000"]
    assert parse_host_port("[::1]:5000") == Tcp("::1", 5000)
    assert str(Tcp("::1", 5000)) == "[::1]:5000"


def test_the_hub_is_the_environments_unless_told(monkeypatch):
    assert _parse(["say", "r", "t"]).hub == "tcp://127.0.0.1:8080"
    monkeypatch.setenv("TABANE_HUB", "unix:///run/tabane/hub.sock")
    assert _parse(["say", "r", "t"]).hub == _parse(["top"]).hub == "unix:///run/tabane/hub.sock"
    assert _parse(["say", "r", "t", "--hub", "tcp://[::1]:1"]).hub == "tcp://[::1]:1"
    monkeypatch.setenv("TABANE_HUB", "")
    assert _parse(["bench"]).hub == "tcp://127.0.0.1:8080"


def test_a_wrong_hub_in_the_environment_is_named(monkeypatch, capsys):
    monkeypatch.setenv("TABANE_HUB", "somewhere")
    assert main(["state", "r"]) == 2
    assert "'somewhere' is no hub's address" in capsys.readouterr().err


def test_an_empty_token_is_refused(tmp_path, capsys):
    file = tmp_path / "token"
    file.touch(mode=0o600)
    assert main(["serve", "--listen", "tcp://127.0.0.1:0", "--token-file", str(file)]) == 1
    assert f"{file} is empty" in capsys.readouterr().err
    with pytest.raises(UsageError, match="not empty"):
        Hub("hub", token="")
