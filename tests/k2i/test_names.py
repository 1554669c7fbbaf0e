"""Names of users and groups: looked up again only when they may have changed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tabane.k2i import names as module
from tabane.k2i.names import ELSEWHERE_S, Names


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counter[int]:
    """How often each user was looked up; they are called after the file of accounts."""
    found: Counter[int] = Counter()
    accounts = tmp_path / "passwd"
    accounts.write_text("alice")

    def look_up(uid: int) -> str:
        found[uid] += 1
        return f"{accounts.read_text()}-{uid}"

    monkeypatch.setattr(module, "ACCOUNTS", (accounts, tmp_path / "none"))
    monkeypatch.setattr(module, "_look_up_user", look_up)
    return found


def test_a_thousand_users_cost_nothing_while_nothing_changes(
    looked: Counter[int], tmp_path: Path
) -> None:
    names = Names()
    names.refresh(0.0)
    for uid in range(1000):
        assert names.user(uid) == f"alice-{uid}"
    for now in range(5, int(ELSEWHERE_S), 5):
        assert not names.refresh(float(now))
    assert set(looked.values()) == {1}
    (tmp_path / "passwd").write_text("bertha")
    assert names.refresh(ELSEWHERE_S - 1) and names.user(7) == "bertha-7"
    assert set(looked.values()) == {2}


def test_what_is_elsewhere_is_asked_for_again_now_and_then(looked: Counter[int]) -> None:
    names = Names()
    names.refresh(0.0)
    names.user(7)
    assert not names.refresh(ELSEWHERE_S - 1) and looked[7] == 1
    assert not names.refresh(ELSEWHERE_S) and looked[7] == 2, "it is what it was"


def test_names_of_those_long_gone_are_forgotten(
    looked: Counter[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 100)
    names = Names()
    for uid in range(101):
        names.user(uid)
    assert names.refresh(0.0)
    assert not names._users and set(looked.values()) == {1}
