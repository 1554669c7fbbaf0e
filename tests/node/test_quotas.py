"""`limits.toml`: what it says, and what becomes of mistakes in it."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from tabane.errors import SpecError
from tabane.node.quotas import QuotaFile, load_quotas
from tabane.scheduler.quotas import Quota, Quotas

TEXT = """\
[default]
instances = 50
memory = "4GiB"

[[user]]
name = "{name}"
instances = 200

[[user]]
name = "4242"
starts = 10
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "limits.toml"


def test_users_are_named_or_numbered(path: Path) -> None:
    daemon = pwd.getpwnam("daemon")
    path.write_text(TEXT.format(name="daemon"))
    assert load_quotas(path) == Quotas(
        Quota(instances=50, memory_bytes=4 << 30),
        {daemon.pw_uid: Quota(instances=200), 4242: Quota(starts=10)},
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TEXT.format(name="nobody-of-that-name"), r"limits.toml:6: .*there is no user 'nobody-of"),
        ("[default]\ninstance = 3", r"limits.toml:2: .*no such field.*instances"),
        ('[default]\nmemory = "much"', r"limits.toml:2: .*is no size"),
        ("[default]\ninstances = -1", r"not a whole number"),
        ("[[user]]\ninstances = 3", r"user\[1\].name: is missing"),
        ("[default", r"this is not TOML"),
        ("a = " + "[" * 9_000, r"nested too deeply|this is not TOML"),
    ],
)
def test_mistakes_are_named(path: Path, text: str, problem: str) -> None:
    path.write_text(text)
    with pytest.raises(SpecError, match=problem):
        load_quotas(path)


def write(path: Path, text: str) -> None:
    """As an editor does: another file in its place."""
    scratch = path.with_name("limits.toml.new")
    scratch.write_text(text)
    scratch.replace(path)


def test_a_change_counts_from_the_next_look_and_a_mistake_changes_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = QuotaFile(path)
    assert file.current() == Quotas()
    write(path, "[default]\ninstances = 3")
    assert file.current().default == Quota(instances=3)
    write(path, "[default]\ninstances = many")
    assert file.current().default == Quota(instances=3)
    assert "limits.toml" in caplog.text
    caplog.clear()
    assert file.current().default == Quota(instances=3)
    assert not caplog.text, "it is complained of once"
    path.unlink()
    assert file.current() == Quotas()
