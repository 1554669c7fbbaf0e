"""Options as help texts tell them, and how a shell completes the programs that ask no cluster:
`k2i` and `middlecon`."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from functools import cache
from typing import NamedTuple

_OPTION = re.compile(r"^  (-.*?)(?:  |$)", re.MULTILINE)
_SPELLING = re.compile(r"(--?[A-Za-z0-9][A-Za-z0-9-]*)(?: (\S+))?")


class Option(NamedTuple):
    """`spelling` is one of an option's names."""

    spelling: str
    takes_value: bool


Commands = Mapping[str, list[Option]]
"""A program's own options by an empty word, and those of each of its commands."""


def options_in(run: Callable[[list[str]], object], *words: str) -> list[Option]:
    """The options of what prints its help when it is run with these words and `--help`."""
    help_ = io.StringIO()
    with redirect_stdout(help_), suppress(SystemExit):
        run([*words, "--help"])
    found: dict[str, Option] = {}
    for told in _OPTION.findall(help_.getvalue()):
        spellings = _SPELLING.findall(told)
        takes_value = any(value for _, value in spellings)
        found |= {one: Option(one, takes_value) for one, _ in spellings}
    return list(found.values())


@cache
def programs() -> dict[str, Commands]:
    """By name."""
    from tabane.k2i import cli as k2i
    from tabane.middlecon import cli as middlecon

    found = {name: options_in(middlecon.main, name) for name in middlecon.COMMANDS}
    own = options_in(middlecon.main)
    return {"k2i": {"": options_in(k2i.run)}, "middlecon": {"": own, **found}}


def bash() -> list[str]:
    """A function for each."""
    return [_bash(name, commands) for name, commands in programs().items()]


def _bash(program: str, commands: Commands) -> str:
    cases = []
    for name, options in commands.items():
        words = [option.spelling for option in options]
        cases.append(f"    '{name}') words={shlex.quote(' '.join(words))} ;;")
    valued = [
        f'"{name} {one.spelling}"'
        for name, options in commands.items()
        for one in options
        if one.takes_value
    ]
    names = " ".join(filter(None, commands))
    return BASH.format(
        program=program, names=names, cases="\n".join(cases), valued="|".join(valued)
    )


def fish() -> Iterator[str]:
    for program, commands in programs().items():
        for name, options in commands.items():
            seen = f"complete -c {program}"
            if name:
                yield f"{seen} -n __fish_use_subcommand -f -a {name}"
                seen += f" -n '__fish_seen_subcommand_from {name}'"
            yield from (f"{seen} {fish_option(option)}" for option in options)


def fish_option(option: Option) -> str:
    return in_fish(option.spelling) + " -r" * option.takes_value


def in_fish(spelling: str) -> str:
    """`-l sort`, `-s o`."""
    return f"-{'l' if spelling.startswith('--') else 's'} {spelling.lstrip('-')}"


BASH = """\
_tabane_{program}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}}
    local command="" names="{names}" words="" n
    for ((n = 1; n < COMP_CWORD; n++)); do
        if [[ " $names " == *" ${{COMP_WORDS[n]}} "* ]]; then
            command=${{COMP_WORDS[n]}}
            break
        fi
    done
    COMPREPLY=()
    case "$command $prev" in
    {valued}) return ;;
    esac
    case $command in
{cases}
    esac
    if [[ $cur != -* ]]; then
        words=""
        if [[ -z $command ]]; then words=$names; fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}

complete -o default -F _tabane_{program} {program}"""
