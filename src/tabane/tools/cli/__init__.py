"""The `tabane` command: one literal table of commands, each loaded only when it is called.

Exit codes: 0 done; 1 it failed, what is meant is not there, or only a part of the cluster answered
a question that needs all; 2 the command line is wrong; 130 after Ctrl-C. Where these mean something
else in a command's namesake, `failure_code` has what it ends with. Every failure is one sentence on
stderr.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from io import TextIOWrapper
    from types import FrameType
    from typing import Any, TextIO

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("cluster", "start a local cluster: data centers with nodes in namespaces of their own"),
    "down": ("cluster", "stop it and leave nothing behind"),
    "demo": ("demo", "bring up three data centers and show a program woken by a request"),
    "node": ("cluster", "run one node in the foreground (what `up` starts for each)"),
    "deploy": ("deploy", "store apps; a request will start each"),
    "apps": ("apps", "list apps"),
    "show": ("apps", "all about one app: instances, wakes, events, why it does not start"),
    "why": ("why", "where an app would run next and why; why its wakes took so long"),
    "rm": ("deploy", "remove apps"),
    "scale": ("apps", "change an app's min and max"),
    "shell": ("shell", "a shell whose /proc is the cluster's: ps, top, htop, kill of the host"),
    "ps": ("ps", "processes of all data centers"),
    "pstree": ("pstree", "who started whom, node by node"),
    "pgrep": ("pgrep", "find processes by name and more"),
    "pidof": ("pgrep", "find processes by exact name"),
    "pkill": ("pgrep", "signal processes by name and more"),
    "kill": ("kill", "signal processes, wherever they run"),
    "renice": ("kill", "change how nice running processes are"),
    "nice": ("nice", "run a command in an instance, nicer than its program"),
    "free": ("free", "memory of each node"),
    "uptime": ("uptime", "how long nodes run, and their load"),
    "w": ("uptime", "who is logged in to which node"),
    "df": ("df", "how full file systems are"),
    "lsof": ("lsof", "open files and sockets of processes"),
    "vmstat": ("vmstat", "memory, swapping, disks and CPUs, again and again"),
    "wakes": ("records", "what each wake cost, phase by phase"),
    "events": ("records", "what happened to instances, and to the nodes' own processes"),
    "stop": ("instances", "drain and stop an instance"),
    "logs": ("logs", "output of an instance or of an app's instances"),
    "exec": ("exec", "run a command inside an instance, or a shell (-it)"),
    "cp": ("cp", "copy files into an instance or out of it"),
    "image": ("images", "list, pull, push, import and remove images"),
    "checkpoint": ("checkpoints", "list, inspect and remove checkpoints of apps"),
    "volume": ("volumes", "list and remove durable storage of apps"),
    "trigger": ("trigger", "list the timers and rooms that wake apps, and try one out"),
    "members": ("nodes", "nodes and their hubs"),
    "completion": ("completion", "a script for bash, zsh or fish that completes what is typed"),
    "doctor": ("nodes", "which drivers work here, and why others do not"),
}


CLEANS_UP = frozenset({"up", "down", "demo", "deploy", "doctor", "cp", "image"})
"""These undo what they have begun when they are interrupted; all others just end."""
SBIN = ("/usr/sbin", "/sbin")
"""Where programs are that users other than root do not find, as nft and runc."""
INTERRUPTED = 130
IMPORTING_S = 0.001
"""After so long it is looked whether an import is over that Ctrl-C came amid."""
IN_THE_SHELL = frozenset({"top", "htop"})
"""What `tabane shell` has of the machine's own."""
MEANT = {
    "build": "image import",
    "images": "image ls",
    "inspect": "show",
    "nodes": "members",
    "pull": "image pull",
    "push": "image push",
    "rmi": "image rm",
    "run": "deploy",
    "start": "deploy",
    "stats": "ps",
    "status": "members",
}
"""What does here what users know by these names from elsewhere."""
PASSES_CODE_ON = frozenset({"exec", "nice"})
OWN_FAILURE = 125
"""Of a command that ends as another does: as of docker, nice and timeout."""
FINDS = frozenset({"pgrep", "pkill", "pidof"})
CANNOT_TELL = 3
"""Of a command whose 1 means that nothing was found."""


def main() -> None:
    """Entry point of the console script. Little is imported before the first line of it, since
    Ctrl-C means a traceback until then."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    sys.stdout = usable(sys.stdout, os.O_RDONLY)
    sys.stderr = usable(sys.stderr, os.O_WRONLY)
    os.environ["PATH"] = with_sbin(os.environ.get("PATH", os.defpath))
    try:
        code = run(sys.argv[1:], on_command=_watch_interrupts)
        if signal.setitimer(signal.ITIMER_REAL, 0)[0]:
            code = INTERRUPTED
    except KeyboardInterrupt:  # it came when all was done
        code = INTERRUPTED
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _end(number: int, frame: FrameType | None) -> None:
    """There is nothing to clean up, and much of the interpreter may be half-way imported."""
    os._exit(INTERRUPTED)


def _watch_interrupts(name: str) -> None:
    import signal

    if name in CLEANS_UP and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, amid an import only when that is over: in there are callbacks in
    which it is lost, and classes being made, for which it becomes another error."""
    import signal

    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None:
        raise KeyboardInterrupt
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, IMPORTING_S)


def with_sbin(path: str) -> str:
    """A search path that ends with what is missing of `SBIN`."""
    directories = path.split(os.pathsep)
    return os.pathsep.join([*directories, *(d for d in SBIN if d not in directories)])


def usable(stream: Any, in_place: int) -> TextIO:
    """What it cannot encode is escaped. In place of one that is closed (None) is nothing, opened so
    that what is written is lost, or (`O_RDONLY`) fails."""
    found: TextIOWrapper = stream or open(os.open(os.devnull, in_place), "w")  # noqa: SIM115, PTH123
    found.reconfigure(errors="backslashreplace")
    return found


def run(argv: list[str], *, on_command: Callable[[str], object] = str) -> int:
    """Run one command; returns its exit code. `on_command` is told its name before it begins."""
    try:
        return _run(argv, on_command)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(argv: list[str], on_command: Callable[[str], object]) -> int:
    from tabane.errors import SpecError, TabaneError, UsageError

    name = ""
    try:
        root, name, rest = _split(argv)
        code = _dispatch(root, name, rest, on_command)
        sys.stdout.flush()
        return code
    except SpecError as error:  # which begins with the place, for editors
        return _fail("", error.message, failure_code(name, is_wrong=True))
    except TabaneError as error:
        is_wrong = type(error) is UsageError
        return _fail(name, error.message, failure_code(name, is_wrong=is_wrong))
    except BrokenPipeError:
        _drop_output()
        return failure_code(name)
    except OSError as error:
        if error.filename is None:
            _drop_output()
        problem = f"{error.filename or 'cannot write'}: {error.strerror or error}"
        return _fail(name, problem, failure_code(name))


def failure_code(name: str, *, is_wrong: bool = False) -> int:
    """What a command ends with when it fails itself, or its command line `is_wrong`."""
    if name in PASSES_CODE_ON:
        return OWN_FAILURE
    if is_wrong:
        return 2
    return CANNOT_TELL if name in FINDS else 1


def _fail(name: str, message: str, code: int) -> int:
    from tabane.tools.cli.common import complain

    prefix = f"{name}: "
    complain(message if name not in COMMANDS or message.startswith(prefix) else prefix + message)
    return code


def _drop_output() -> None:
    """What could not be written is not tried again at the interpreter's end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """`--root` with its value, the command, the words for it. Raises `UsageError`."""
    root: list[str] = []
    if argv and argv[0].startswith("--root="):
        root, argv = argv[:1], argv[1:]
    elif argv[:1] == ["--root"]:
        root, argv = argv[:2], argv[2:]
        if len(root) < 2:
            from tabane.errors import UsageError

            raise UsageError("--root: name the cluster's directory after it")
    return root, argv[0] if argv else "--help", argv[1:]


def _dispatch(
    root: list[str], name: str, rest: list[str], on_command: Callable[[str], object]
) -> int:
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        from tabane import __version__

        print(f"tabane {__version__}")
        return 0
    if name not in COMMANDS:
        from tabane.errors import UsageError

        raise UsageError(f"there is no command '{name}': {_hint(name)}")
    from importlib import import_module

    on_command(name)
    module = import_module(f"tabane.tools.cli.{COMMANDS[name][0]}")
    try:
        code: int = getattr(module, name)([*root, *rest])
    except SystemExit:  # argparse's, after --help
        return 0
    return code


def _hint(name: str) -> str:
    from difflib import get_close_matches

    if name in IN_THE_SHELL:
        return f"`tabane shell -c {name}` is this machine's, over all nodes"
    near = [MEANT[name]] if name in MEANT else get_close_matches(name, COMMANDS, 1)
    return f"did you mean '{near[0]}'?" if near else "see 'tabane --help'"


def _overview() -> str:
    lines = ["usage: tabane [--root DIR] COMMAND ...", "", "One UNIX over all data centers.", ""]
    width = max(map(len, COMMANDS))
    lines += [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    lines += ["", "'tabane COMMAND --help' tells more of each."]
    return "\n".join(lines)
