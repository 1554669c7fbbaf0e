"""Mistakes on a command line, in one sentence each."""

from __future__ import annotations

import argparse

import pytest

from tabane.commandline import CommandLine, is_option
from tabane.errors import UsageError


def parser(**more: str) -> CommandLine:
    line = CommandLine("prog do", prefix="do: ", **more)
    line.add_version("-V")
    line.add_argument("-f", "--format", metavar="TEXT")
    line.add_argument("-n", type=int)
    line.add_argument("--kind", choices=("a", "b"))
    either = line.add_mutually_exclusive_group()
    either.add_argument("-x", "--exact", action="store_true")
    either.add_argument("-y", action="store_true")
    line.add_argument("what")
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "do: something is missing: write `prog do WHAT`"),
        ("--fromat x y", "do: there is no option --fromat: did you mean --format?"),
        ("--fromat=x", "do: there is no option --fromat: did you mean --format?"),
        ("--bogus y", "do: there is no option --bogus: `prog do --help` lists them"),
        ("-xZ y", "do: there is no option -Z: `prog do --help` lists them"),
        ("-Z", "do: there is no option -Z: `prog do --help` lists them"),
        ("y -f", "do: -f/--format needs a value after it"),
        ("-n x y", "do: -n: 'x' is no whole number"),
        ("--kind c y", "do: --kind: 'c' is none of a, b"),
        ("--exact=5 y", "do: --exact takes no value"),
        ("-x -y w", "do: -y: not allowed with argument -x/--exact"),
        ("y z", "do: there are more words than `prog do WHAT` takes"),
    ],
)
def test_mistakes(words: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parser().parse_args(words.split())
    assert caught.value.message == said


def test_what_might_have_been_something_else() -> None:
    line = parser(or_else="neither an option nor a signal")
    for word, said in (
        ("-NOPE", "do: -NOPE is neither an option nor a signal"),
        ("--nope", "do: there is no option --nope: `prog do --help` lists them"),
    ):
        with pytest.raises(UsageError) as caught:
            line.parse_args([word, "y"])
        assert caught.value.message == said


def test_what_is_right() -> None:
    found = parser().parse_args(["-xfa", "-n", "-5", "--", "-what"])
    assert (found.exact, found.format, found.n, found.what) == (True, "a", -5, "-what")


def test_options_between_words() -> None:
    line = CommandLine("prog")
    line.add_argument("-x", action="store_true")
    line.add_argument("words", nargs="*")
    assert line.parse_intermixed(["a", "-x", "b"]) == argparse.Namespace(x=True, words=["a", "b"])
    with pytest.raises(UsageError, match="there is no option -z"):
        line.parse_intermixed(["a", "-z", "b"])


def test_a_command_of_several_names_its_own_mistakes() -> None:
    line = CommandLine("prog")
    commands = line.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("say").add_argument("--loud", action="store_true")
    with pytest.raises(UsageError, match=r"^there is no option --luod: did you mean --loud"):
        line.parse_args(["say", "--luod"])
    with pytest.raises(UsageError, match=r"^there is no option --bogus: `prog --help`"):
        line.parse_args(["--bogus"])
    with pytest.raises(UsageError, match=r"^something is missing: write `prog COMMAND"):
        line.parse_args([])


@pytest.mark.parametrize("words", [["-V"], ["--version"], ["-xV"]])
def test_the_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("prog ")


@pytest.mark.parametrize(
    ("word", "is_one"),
    [
        *(("-x", True), ("--x", True), ("-5x", True)),
        *((word, False) for word in ("-", "--", "-5", "-.5", "x", "")),
    ],
)
def test_what_looks_like_an_option(word: str, is_one: bool) -> None:
    assert is_option(word) is is_one
