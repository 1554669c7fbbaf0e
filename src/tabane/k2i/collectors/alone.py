"""Runs a command so that nothing of it is left: `python -I -S alone.py STARTER COMMAND...`.

As a child subreaper (prctl(2)) it stays above all that the command starts, whatever their sessions.
It kills them when the command has ended, when TERM comes, and when its parent, which must be the
process `STARTER`, has. Then it ends as the command did: with its exit code, or 128 and the signal.

The standard library only, and little of that: it is started for each reading.
"""

import ctypes
import os
import signal
import sys
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
NOT_RUN = 127
"""As a shell says it."""


class Told(BaseException):
    """TERM came."""


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, _on_term)
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        if os.getppid() != int(argv[0]):
            raise Told
        return _run(argv[1:])
    except Told:
        return 128 + signal.SIGTERM
    except OSError as error:
        print(f"{argv[1]} cannot be run: {error.strerror}", file=sys.stderr)
        return NOT_RUN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_all()


def _run(argv: list[str]) -> int:
    environment = {name: value for name, value in os.environ.items() if name != "LC_CTYPE"}
    pid = os.posix_spawnp(argv[0], argv, environment)  # this Python may have set LC_CTYPE
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _end_all() -> None:
    """Children of one that is killed become this process's own."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:  # noqa: PTH123
            for pid in children.read().split():
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _on_term(number: int, frame: object) -> NoReturn:
    raise Told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
