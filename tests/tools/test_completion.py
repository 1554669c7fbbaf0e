"""tabane completion: what a real bash completes with the script."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tools.answers import APP, IMAGE, INSTANCE
from tests.tools.conftest import EVIL, Pretended, Run, check_refusal, reply
from tests.tools.test_cli import parser_of

from tabane.middlecon import cli as middlecon
from tabane.tools.cli import COMMANDS, completion, programs
from tabane.tools.cli.programs import Option

ASK = """
source /dev/stdin
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
found=$(complete -p "$1")
found=${found#*-F }
${found%% *}
printf '%s\\n' "${COMPREPLY[@]}"
"""
NOTE_OPTIONS = """
compopt() { echo "$@"; }
"""


@pytest.fixture(scope="module")
def script() -> str:
    return completion.script("bash")


class Shell:
    """A bash that has sourced the script, with `tabane` in its path."""

    def __init__(self, directory: Path, script: str) -> None:
        self.root = directory / "root"
        self._script = script
        program = directory / "bin" / "tabane"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tabane.tools.cli "$@"\n')
        program.chmod(0o755)
        self._environment = os.environ | {
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "TABANE_ROOT": str(self.root),
        }

    def complete(self, *words: str, program: str = "tabane") -> set[str]:
        return set(self._ask(ASK, program, *words).split())

    def offers_files(self, *words: str) -> bool:
        """Whether it does, for a word that begins nothing else."""
        return "+o default" not in self._ask(NOTE_OPTIONS + ASK, "tabane", *words)

    def _ask(self, how: str, *words: str) -> str:
        done = subprocess.run(
            ["bash", "--norc", "-c", how, "bash", *words],
            input=self._script,
            capture_output=True,
            text=True,
            env=self._environment,
            timeout=30,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout


@pytest.fixture
def shell(tmp_path: Path, script: str) -> Shell:
    return Shell(tmp_path, script)


@pytest.fixture
def cluster(shell: Shell) -> object:
    shell.root.mkdir()
    pretended = Pretended(shell.root)
    apps = [APP, APP | {"namespace": "shop", "name": "cart"}, APP | {"name": EVIL}]

    def tell(line: str, _: bytes) -> bytes:
        if "/images" in line:
            return reply({"images": [IMAGE, IMAGE | {"digest": EVIL}], "silent": []})
        if "/volumes" in line:
            volumes = [{"app": "default/hello", "name": "data"}, {"app": "x/y", "name": EVIL}]
            return reply({"volumes": [*volumes, {"app": "shop/cart", "name": "files"}]})
        if "/apps" in line:
            return reply({"apps": apps, "silent": []})
        return reply({"instances": [INSTANCE, INSTANCE | {"id": "abd456"}], "silent": []})

    pretended.begin(tokyo=tell, osaka=b"")
    yield pretended
    pretended.close()


def test_commands(shell: Shell) -> None:
    assert shell.complete("p") == {"ps", "pstree", "pgrep", "pidof", "pkill"}
    assert shell.complete("") == {*COMMANDS, "--root", "--help", "--version"}
    assert shell.complete("--root", "x", "unk") == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_options(name: str, script: str) -> None:
    """All that the command's parser knows, and which of them take a value."""
    options = {option.spelling: option.takes_value for option in completion.options_of(name)}
    known = {
        spelling: action.nargs != 0
        for action in parser_of(name)._actions
        for spelling in action.option_strings
    }
    assert options == known
    (line,) = re.findall(rf"^ +{name}\) echo (.*) ;;$", script, re.MULTILINE)
    assert set(known) <= set(line.strip("'").split())


def test_options_in_bash(shell: Shell) -> None:
    assert shell.complete("ps", "--so") == {"--sort"}
    assert shell.complete("ps", "aux", "--so") == {"--sort"}
    assert shell.complete("kill", "-T") == {"-TERM"}
    assert shell.complete("completion", "") == {"bash", "zsh", "fish"}


def test_what_is_done_to_images_and_volumes(shell: Shell, cluster: object) -> None:
    assert shell.complete("volume", "") == {"ls", "rm"}
    assert {"ls", "pull", "push", "import", "rm", "gc", "inspect"} == shell.complete("image", "")
    assert shell.complete("image", "p") == {"pull", "push"}
    assert shell.complete("image", "rm", "") == {"a" * 12}
    assert shell.complete("image", "--node", "") == {"osaka/osaka-1", "tokyo/tokyo-1"}
    assert shell.complete("image", "rm", "--no") == {"--node"}
    assert shell.complete("volume", "rm", "") == {"hello/data", "shop/cart/files"}
    assert shell.complete("volume", "rm", "--lo") == {"--lost"}


def test_files_are_offered_only_where_they_have_a_meaning(shell: Shell, cluster: object) -> None:
    """As Readline does where nothing else is there to be completed, unless told not to."""
    lines = ("show", "image ls", "image rm", "volume ls", "volume rm", "stop", "ps --dc", "volume")
    assert [line for line in lines if shell.offers_files(*line.split(), "zzz")] == []
    lines = ("deploy", "cp", "image import", "exec hello cat")
    assert [line for line in lines if not shell.offers_files(*line.split(), "zzz")] == []


def test_columns_of_ps(shell: Shell) -> None:
    assert {"pid", "rss", "gpid"} <= shell.complete("ps", "-o", "")
    assert shell.complete("ps", "--sort", "gp") == {"gpid"}
    assert shell.complete("ps", "-eo", "x") == set()
    assert shell.complete("ps", "-e", "-o", "pid,user,gp") == {"pid,user,gpid"}
    assert shell.complete("ps", "--sort", "=", "gp") == {"gpid"}


def test_what_nobody_knows_is_not_completed(shell: Shell, cluster: object) -> None:
    for line in ("exec -u", "exec -w", "logs -n", "kill -s", "nice -n", "wakes --limit"):
        assert shell.complete(*line.split(), "") == set()
    assert shell.complete("exec", "-u", "root", "--dc", "=", "tokyo", "abd") == {"abd456"}
    assert shell.complete("nice", "hello", "ab") == set()
    assert shell.complete("exec", "-i", "") == {"hello", "shop/cart", "abc123", "abd456"}


def test_names_of_the_cluster(shell: Shell, cluster: object) -> None:
    assert shell.complete("show", "") == {"hello", "shop/cart"}
    assert shell.complete("logs", "") == {"hello", "shop/cart", "abc123", "abd456"}
    assert shell.complete("kill", "-9", "abd") == {"abd456"}
    assert shell.complete("ps", "--dc", "") == {"tokyo", "osaka"}
    assert shell.complete("ps", "--dc", "=", "t") == {"tokyo"}
    assert shell.complete("ps", "--node", "=") == {"tokyo/tokyo-1", "osaka/osaka-1"}
    assert shell.complete("--root", str(shell.root), "ps", "--app", "sh") == {"shop/cart"}


def test_without_a_cluster_there_is_silence(shell: Shell) -> None:
    assert shell.complete("show", "") == set()
    assert shell.complete("ps", "--dc", "") == set()


def test_a_cluster_that_does_not_answer_is_given_up_soon(
    tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "DEADLINE_S", 0.01)
    pretended.begin(tokyo=None)
    assert tabane("completion", "--names", "apps") == (0, "", "")
    assert tabane("completion", "--names", "nodes") == (0, "tokyo/tokyo-1\n", "")
    assert tabane("completion", "--names", "nodes", "--json").out == '["tokyo/tokyo-1"]\n'


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("k2i --li", "--list-collectors"),
        ("k2i --port 80 --ho", "--host"),
        ("k2i --port --ho", ""),
        ("middlecon s", "serve say state"),
        ("middlecon say --hu", "--hub"),
        ("middlecon join room --answer yes --p", "--put"),
        ("middlecon join --hub -", ""),
        ("middlecon --v", "--version"),
        ("middlecon say lobby s", ""),
    ],
)
def test_the_other_programs(line: str, found: str, shell: Shell) -> None:
    program, *words = line.split()
    assert shell.complete(*words, program=program) == set(found.split())


def test_all_that_they_take() -> None:
    told = programs.programs()
    assert [*told["middlecon"]] == ["", *middlecon.COMMANDS]
    of_all = {option.spelling for of in told["middlecon"].values() for option in of}
    assert {"--listen", "--no-chat", "--token-file", "--json", "--members"} <= of_all
    assert Option("--unix", True) in told["k2i"][""]


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_every_shell_gets_every_command(name: str, tabane: Run) -> None:
    ended = tabane("completion", name)
    assert (ended.code, ended.err) == (0, "")
    for command in (*COMMANDS, "k2i", *middlecon.COMMANDS):
        assert re.search(rf"\b{command}\b", ended.out)
    if name == "zsh":
        assert ended.out.startswith("autoload")


def test_other_shells(tabane: Run) -> None:
    check_refusal(tabane("completion"), 2, "completion: name your shell: bash, zsh or fish")
    check_refusal(
        tabane("completion", "ksh"), 2, "completion: SHELL: 'ksh' is none of bash, zsh, fish"
    )
