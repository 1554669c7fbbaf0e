"""The `tabane` command: one literal table of commands, each loaded only when it is called.

Exit codes: 0 done; 1 it failed, or only a part of the cluster answered a question that needs all;
2 the request is wrong. Every failure is one sentence on stderr.
"""

from __future__ import annotations

import sys
from importlib import import_module

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("cluster", "start a local cluster: data centers with nodes in namespaces of their own"),
    "down": ("cluster", "stop it and leave nothing behind"),
    "demo": ("demo", "bring up three data centers and show a program woken by a request"),
    "node": ("cluster", "run one node in the foreground (what `up` starts for each)"),
    "deploy": ("apps", "store an app; a request will start it"),
    "apps": ("apps", "list apps"),
    "show": ("apps", "all about one app: instances, wakes, events, why it does not start"),
    "rm": ("apps", "remove an app"),
    "scale": ("apps", "change an app's min and max"),
    "ps": ("ps", "processes of all data centers"),
    "wakes": ("records", "what each wake cost, phase by phase"),
    "events": ("records", "what happened to instances"),
    "stop": ("instances", "drain and stop an instance"),
    "logs": ("instances", "output of an instance or of an app's instances"),
    "exec": ("instances", "run a command inside an instance"),
    "members": ("nodes", "nodes and their hubs"),
    "doctor": ("nodes", "which drivers work here, and why others do not"),
}


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    from tabane.errors import TabaneError

    try:
        return _dispatch(argv)
    except TabaneError as error:
        from tabane.errors import UsageError

        print(f"tabane: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        return 130


def _dispatch(argv: list[str]) -> int:
    root: list[str] = []
    if argv[:1] == ["--root"] and len(argv) > 1:
        root, argv = argv[:2], argv[2:]
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        from tabane import __version__

        print(f"tabane {__version__}")
        return 0
    if name not in COMMANDS:
        from difflib import get_close_matches

        from tabane.errors import UsageError

        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean '{near[0]}'?" if near else "see 'tabane --help'"
        raise UsageError(f"there is no command '{name}': {hint}")
    module = import_module(f"tabane.tools.cli.{COMMANDS[name][0]}")
    code: int = getattr(module, name.replace("-", "_"))([*root, *argv[1:]])
    return code


def _overview() -> str:
    lines = ["usage: tabane [--root DIR] COMMAND ...", "", "One UNIX over all data centers.", ""]
    lines += [f"  {name:<9} {about}" for name, (_, about) in COMMANDS.items()]
    lines += ["", "'tabane COMMAND --help' tells more of each."]
    return "\n".join(lines)
