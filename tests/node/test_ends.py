from pathlib import Path

import pytest

from tabane.errors import Busy, Corrupt, EngineError, NotFound, Unsupported, UsageError
from tabane.model import App, ExitStatus, Reactive
from tabane.node.ends import explain_end, explain_timeout, with_last_line, would_repeat

WEB = App("web", "host", port=80, reactive=Reactive(start_timeout_s=2.5))
WORKER = App("worker", "host")


@pytest.mark.parametrize(
    ("app", "status", "facts", "words"),
    [
        (WEB, ExitStatus(3), {"was_ready": True}, "the program exited with code 3"),
        (WORKER, ExitStatus(3), {"was_ready": False}, "the program exited with code 3"),
        (
            WEB,
            ExitStatus(signal=9),
            {"was_ready": False},
            "the program was killed by SIGKILL before it listened on port 80",
        ),
        (
            WEB,
            ExitStatus(0),
            {"was_ready": True, "ordered": True},
            "the program exited with code 0, after a signal by order",
        ),
        (
            WEB,
            ExitStatus(1, container="cache"),
            {"was_ready": False},
            "container cache exited with code 1 before the program listened on port 80",
        ),
        (
            WEB,
            ExitStatus(signal=9, oom=True, container="cache"),
            {"was_ready": True},
            "container cache was killed by SIGKILL (out of memory)",
        ),
    ],
)
def test_how_it_ended(app: App, status: ExitStatus, facts: dict[str, bool], words: str) -> None:
    assert explain_end(app, status, **facts) == words


def test_what_was_not_ready_in_time() -> None:
    assert explain_timeout(WEB, "") == ("it did not become ready (listen on port 80) within 2.5 s")
    assert explain_timeout(WORKER, "it sleeps").endswith("ready (listen) within 10 s: it sleeps")


def test_its_last_line(tmp_path: Path) -> None:
    assert with_last_line("it ended", tmp_path / "none") == "it ended"


@pytest.mark.parametrize(
    ("error", "repeats"),
    [
        (UsageError("its image has no program"), True),
        (Unsupported("no services"), True),
        (Corrupt("not its digest"), True),
        (NotFound("the image is not here"), False),
        (Busy("too many"), False),
        (EngineError("it failed"), False),
        (OSError("no memory"), False),
    ],
)
def test_what_another_try_cannot_mend(error: Exception, repeats: bool) -> None:
    assert would_repeat(error) is repeats
