"""What is in the repository: pages, pins, and nothing that belongs to somebody's own machine."""

from __future__ import annotations

import importlib
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FOREIGN = {
    "somebody's own path": r"/(?:root|work|home/\w+|Users/\w+)/[\w.]",
    "a package registry": r"(?:pypi|pythonhosted|npmjs)[.]org|deb[.]debian[.]org|docker[.]io\b",
    "a conflict left unresolved": r"^(?:<{7}|>{7}) ",
    "a promise instead of code": r"\b(?:TODO|FIXME|XXX)\b",
}
SKIPS = r"pytest[.](?:skip|xfail|importorskip)\b|mark[.](?:skip|skipif|xfail)\b"
MAX_README_LINES = 150


def tracked_text() -> dict[Path, str]:
    """The text files that git knows, by path in the repository."""
    argv = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    names = subprocess.run(argv, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    found = {}
    for path in map(Path, filter(None, names.split("\0"))):
        raw = (ROOT / path).read_bytes() if (ROOT / path).is_file() else b"\0"
        if b"\0" not in raw:
            found[path] = raw.decode()
    return found


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return tracked_text()


@pytest.mark.parametrize("what", FOREIGN)
def test_nothing_foreign_is_tracked(what: str, texts: dict[Path, str]) -> None:
    pattern = re.compile(FOREIGN[what], re.MULTILINE)
    this = Path(__file__).relative_to(ROOT)
    wrong = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for path, text in texts.items()
        if path != this
        for match in pattern.finditer(text)
    ]
    assert not wrong, f"{what}:\n" + "\n".join(wrong)


def test_pages_name_commands_that_there_are(texts: dict[Path, str]) -> None:
    from tabane.tools.cli import COMMANDS

    lines = re.compile(r"(?:`|^    (?:[.]venv/bin/)?)tabane ([a-z][a-z0-9]*)\b", re.MULTILINE)
    pages = {path: text for path, text in texts.items() if path.suffix == ".md"}
    named = {(str(path), name) for path, text in pages.items() for name in lines.findall(text)}
    assert len(named) > len(COMMANDS)
    assert [(path, name) for path, name in sorted(named) if name not in COMMANDS] == []


def test_no_test_is_skipped(texts: dict[Path, str]) -> None:
    this = Path(__file__).relative_to(ROOT)
    wrong = [
        str(path)
        for path, text in texts.items()
        if path.parts[0] == "tests" and path != this and re.search(SKIPS, text)
    ]
    assert not wrong, "mark what needs root as `real`; all else runs everywhere: " + ", ".join(
        wrong
    )


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_the_first_page_is_short(name: str) -> None:
    assert len((ROOT / name).read_text().splitlines()) < MAX_README_LINES


def anchors(page: str) -> set[str]:
    """What links may name in a page: its headings, as GitHub writes them."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def test_links_between_pages_lead_somewhere(texts: dict[Path, str]) -> None:
    pages = {path: text for path, text in texts.items() if path.suffix == ".md"}
    named = {(ROOT / path).resolve(): anchors(text) for path, text in pages.items()}
    wrong = []
    for path, text in pages.items():
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
            file = (ROOT / path.parent / target if target else ROOT / path).resolve()
            there = file in named and anchor in named[file] if anchor else file.exists()
            if not there:
                wrong.append(f"{path}: {target}#{anchor}")
    assert not wrong, "\n".join(wrong)


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    extras = PROJECT["project"]["optional-dependencies"].values()
    wanted = [
        *PROJECT["project"]["dependencies"],
        *PROJECT["build-system"]["requires"],
        *(requirement for extra in extras for requirement in extra),
    ]
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == PROJECT["project"]["name"]:  # an extra of an extra
            continue
        assert name in versions, f"{name} is not in requirements.lock: run scripts/lock {name}"
        assert requirement.specifier.contains(versions[name]), f"run scripts/lock {name}"


@pytest.mark.parametrize("target", PROJECT["project"]["scripts"].values())
def test_every_command_leads_to_a_function(target: str) -> None:
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("arguments", [[], ["everything"], ["demo", "test"]])
def test_set_up_says_what_it_takes(arguments: list[str]) -> None:
    argv = [str(ROOT / "scripts" / "setup"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "setup: usage: scripts/setup demo|check|test|bench|all\n"


def test_help_names_every_target() -> None:
    done = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    named = set(re.findall(r"^  make (\w+)", done.stdout, re.MULTILINE))
    assert named == set(re.findall(r"^\.PHONY: (\w+)", (ROOT / "Makefile").read_text(), re.M))
