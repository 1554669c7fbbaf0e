"""`tabane completion`: what a shell needs to complete `tabane` commands, and the other programs'.

The script has the commands and their options in it, as their `--help` tells them; names of apps,
instances, nodes and data centers are asked of the cluster when they are wanted, quickly, and in
silence when that fails: nobody wants an error in the middle of typing.
"""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn

from tabane.errors import TabaneError, TimedOut, UsageError
from tabane.tools.cli.common import Parser
from tabane.tools.cli.programs import Option, fish_option, in_fish, options_in

SHELLS = ("bash", "zsh", "fish")
KINDS = (
    *("images", "checkpoints", "volumes", "apps", "instances", "targets", "nodes", "datacenters"),
    "columns",
)
DEADLINE_S = 1.0
"""Who waits for names in the middle of typing does not wait longer."""
VALUES = {"--dc": "datacenters", "--node": "nodes", "--app": "apps"}
WORDS = {
    **dict.fromkeys(("show", "why", "rm", "scale", "wakes", "events"), "apps"),
    **dict.fromkeys(("stop", "logs"), "targets"),
    **dict.fromkeys(("kill", "renice", "pstree"), "instances"),
}
"""What the words of commands are; of others: files."""
RUNS = ("exec", "nice")
"""Here only the first is a target: then comes what is to be run there."""
ACTIONS = {
    "image": ("ls", "pull", "push", "import", "inspect", "rm", "gc"),
    "checkpoint": ("ls", "inspect", "rm", "gc"),
    "volume": ("ls", "rm"),
}
"""Commands whose first word is what to do."""
ACTED_ON = {
    **dict.fromkeys(("image push", "image inspect", "image rm"), "images"),
    **dict.fromkeys(("checkpoint inspect", "checkpoint rm"), "checkpoints"),
    "volume rm": "volumes",
}
"""What the words after that are; of others: files."""
ON_NOTHING = (
    *("image ls", "image pull", "image gc"),
    *("checkpoint ls", "checkpoint gc", "volume ls"),
)
"""After these comes no file either."""
COLUMN_OPTIONS = ("-o", "-O", "--format", "--sort")
"""Of ps."""
SIGNALS = "-TERM -KILL -HUP -INT -QUIT -USR1 -USR2 -STOP -CONT"
SENDS_SIGNALS = ("kill", "pkill")


def completion(argv: list[str]) -> int:
    parser = Parser("completion", "A script to complete tabane, k2i and middlecon in a shell.")
    parser.usage = "tabane completion {bash,zsh,fish}"
    parser.add_argument("--names", choices=KINDS, help="print what the cluster has of these")
    parser.add_argument("--json", action="store_true", help="with --names: as a list")
    parser.add_argument("shell", nargs="?", choices=SHELLS)
    args = parser.parse_args(argv)
    if args.names:
        found = names(args.names, args.root)
        if args.json:
            import json

            print(json.dumps(found))
        else:
            print("\n".join(found) + "\n" * bool(found), end="")
        return 0
    if args.shell is None:
        raise UsageError("completion: name your shell: bash, zsh or fish")
    print(script(args.shell))
    return 0


def names(kind: str, root: object) -> list[str]:
    """What there is of a kind; nothing when the cluster does not say so in time."""
    before = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        with suppress(TabaneError, OSError, LookupError, TypeError):
            return sorted(_ask(kind, root))
        return []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _give_up(number: int, frame: FrameType | None) -> NoReturn:
    raise TimedOut("the cluster did not answer in time")


def _ask(kind: str, root: object) -> set[str]:
    if kind == "columns":
        from tabane.tools.cli.columns import COLUMNS

        return set(COLUMNS)
    from pathlib import Path

    from tabane.tools.client import Cluster

    cluster = Cluster(root if isinstance(root, Path) else None)
    if kind == "nodes":
        return set(cluster.nodes)
    if kind == "datacenters":
        return {node.partition("/")[0] for node in cluster.nodes}
    found: set[str] = set()
    if kind in ("images", "checkpoints"):
        kept = cluster.get(f"/api/v1/{kind}")[kind]
        found |= {one["digest"].removeprefix("sha256:")[:12] for one in kept}
    if kind == "volumes":
        volumes = cluster.get("/api/v1/volumes")["volumes"]
        found |= {
            f"{volume['app'].removeprefix('default/')}/{volume['name']}" for volume in volumes
        }
    if kind in ("apps", "targets"):
        found |= {_short(app) for app in cluster.get("/api/v1/apps")["apps"]}
    if kind in ("instances", "targets"):
        found |= {instance["id"] for instance in cluster.get("/api/v1/instances")["instances"]}
    return {name for name in found if re.fullmatch("[a-z0-9/-]+", name)}


def _short(app: dict[str, str]) -> str:
    return app["name"] if app["namespace"] == "default" else f"{app['namespace']}/{app['name']}"


def options_of(name: str) -> list[Option]:
    """A command's options, as its help tells them."""
    from tabane.tools.cli import COMMANDS

    module = import_module(f"tabane.tools.cli.{COMMANDS[name][0]}")
    return options_in(getattr(module, name))


def script(shell: str) -> str:
    """The whole script, to be sourced. It has the other two programs in it, too."""
    from tabane.tools.cli import COMMANDS, programs

    options = {name: options_of(name) for name in COMMANDS}
    if shell == "fish":
        return "\n".join([*_fish(options), *programs.fish()])
    bash = BASH.format(
        commands=" ".join(COMMANDS),
        options="\n".join(_case(name, of) for name, of in options.items()),
        valued="|".join(_valued(options)),
        columns="|".join(f'"ps {option}"' for option in COLUMN_OPTIONS),
        values="\n".join(f"        {opt}) kind={kind} ;;" for opt, kind in VALUES.items()),
        words="\n".join(f"        {name}) kind={kind} ;;" for name, kind in WORDS.items()),
        runs="|".join(RUNS),
        actions="\n".join(
            f'        "{name} ") words="{" ".join(of)}" ;;' for name, of in ACTIONS.items()
        ),
        acted_on="\n".join(f'        "{name}") kind={kind} ;;' for name, kind in ACTED_ON.items()),
        on_nothing="|".join(f'"{name}"' for name in ON_NOTHING),
        shells=" ".join(SHELLS),
    )
    bash = "\n\n".join([bash, *programs.bash()])
    return f"autoload -U +X bashcompinit && bashcompinit\n{bash}" if shell == "zsh" else bash


def _valued(options: dict[str, list[Option]]) -> list[str]:
    """The patterns of a command and an option of it that takes a value."""
    return [
        f'"{name} {one.spelling}"' for name, of in options.items() for one in of if one.takes_value
    ]


def _case(name: str, options: Iterable[Option]) -> str:
    words = [option.spelling for option in options]
    words += SIGNALS.split() if name in SENDS_SIGNALS else []
    return f"        {name}) echo {shlex.quote(' '.join(words))} ;;"


BASH = """\
_tabane_options() {{
    case $1 in
{options}
    esac
}}

_tabane_wants_value() {{
    case "$1 $2" in
        {valued}) return 0 ;;
    esac
    return 1
}}

_tabane() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}}
    local command="" action="" kind="" words="" lead="" n
    local -a root
    root=()
    if [[ $cur == "=" ]]; then
        cur=""
    elif [[ $prev == "=" ]]; then
        prev=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    for ((n = 1; n < COMP_CWORD; n++)); do
        case ${{COMP_WORDS[n]}} in
        --root) root=(--root "${{COMP_WORDS[n+1]}}"); n=$((n + 1)) ;;
        =) n=$((n + 1)) ;;
        -*) ;;
        *) if [[ -z $command ]]; then command=${{COMP_WORDS[n]}};
           elif _tabane_wants_value "$command" "${{COMP_WORDS[n-1]}}"; then continue;
           elif [[ -z $action ]]; then action=${{COMP_WORDS[n]}}; fi ;;
        esac
    done
    COMPREPLY=()
    case $prev in
{values}
        --root) return ;;
    esac
    case "$command $prev" in
        {columns}) kind=columns ;;
    esac
    if [[ -n $kind ]]; then
        :
    elif [[ -z $command ]]; then
        words="{commands} --root --help --version"
    elif _tabane_wants_value "$command" "$prev"; then
        compopt +o default 2>/dev/null
    elif [[ $cur == -* ]]; then
        words=$(_tabane_options "$command")
    else
        case $command in
        {runs}) [[ -z $action ]] && kind=targets ;;
        completion) words="{shells}" ;;
{words}
        esac
        case "$command $action" in
{actions}
{acted_on}
        {on_nothing}) compopt +o default 2>/dev/null ;;
        esac
    fi
    if [[ -n $kind || -n $words ]]; then
        compopt +o default 2>/dev/null
    fi
    if [[ -n $kind ]]; then
        words=$("${{COMP_WORDS[0]}}" "${{root[@]}}" completion --names "$kind" 2>/dev/null)
    fi
    if [[ $kind == columns && $cur == *,* ]]; then
        lead=${{cur%,*}},
    fi
    COMPREPLY=($(compgen -P "$lead" -W "$words" -- "${{cur#"$lead"}}"))
}}

complete -o default -F _tabane tabane"""


def _fish(options: dict[str, list[Option]]) -> list[str]:
    from tabane.tools.cli import COMMANDS

    lines = ["complete -c tabane -n __fish_use_subcommand -f"]
    for name, (_, about) in COMMANDS.items():
        told = shlex.quote(about)
        lines.append(f"complete -c tabane -n __fish_use_subcommand -f -a {name} -d {told}")
        seen = f"complete -c tabane -n '__fish_seen_subcommand_from {name}'"
        if kind := WORDS.get(name, "targets" if name in RUNS else ""):
            lines.append(f"{seen} -f -a '(tabane completion --names {kind} 2>/dev/null)'")
        lines += [f"{seen} {_fish_option(option)}" for option in options[name]]
        lines += _fish_actions(name, seen)
    return lines


def _fish_actions(name: str, seen: str) -> list[str]:
    lines = [f"{seen} -f -a '{' '.join(ACTIONS[name])}'"] if name in ACTIONS else []
    for words, kind in ACTED_ON.items():
        if words.startswith(f"{name} "):
            lines.append(
                f"complete -c tabane -n '__fish_seen_subcommand_from {name}; and "
                f"__fish_seen_subcommand_from {words.partition(' ')[2]}' "
                f"-f -a '(tabane completion --names {kind} 2>/dev/null)'"
            )
    return lines


def _fish_option(option: Option) -> str:
    if option.spelling in VALUES:
        kind = VALUES[option.spelling]
        return f"{in_fish(option.spelling)} -x -a '(tabane completion --names {kind} 2>/dev/null)'"
    return fish_option(option)
