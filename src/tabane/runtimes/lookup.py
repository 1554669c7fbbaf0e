"""Looking things up inside an image's tree: paths, users and commands.

A path in an image means what it means to the program inside, so symbolic links, absolute ones
included, are followed within the tree and never out of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tabane.errors import UsageError
from tabane.runtimes.api import User

MAX_LINKS = 40
"""As the kernel's: more mean a loop."""
LARGEST_ID = 65535


def resolve(tree: Path, path: str, mounts: dict[str, Path] | None = None) -> Path | None:
    """The file in `tree` that `path` means inside, or None. `mounts` lie over the tree.

    `mounts` maps first components (`usr`) to what is mounted there.
    """
    done = _follow(tree, path, mounts or {}, there=True)
    return None if done is None else _locate(tree, done, mounts or {})


def lead(tree: Path, path: str) -> str:
    """Where `path` leads inside, through all links; what is not there is made as it is written.
    Raises `UsageError` when it leads nowhere."""
    done = _follow(tree, path, {}, there=False)
    if done is None:
        raise UsageError(f"the image's links make {path} lead nowhere: they go round")
    return f"/{'/'.join(done)}"


def _follow(tree: Path, path: str, mounts: dict[str, Path], *, there: bool) -> list[str] | None:
    """The parts of the path without links; None when there are too many, or one is not `there` that
    has to be."""
    parts = [*reversed(PurePosixPath(path).parts)]
    done: list[str] = []
    links = 0
    while parts:
        part = parts.pop()
        if part == ".." or part.startswith("/"):
            del done[-1 if part == ".." else 0 :]
            continue
        target = _locate(tree, [*done, part], mounts)
        if there and not os.path.lexists(target):
            return None
        if not target.is_symlink():
            done.append(part)
            continue
        links += 1
        if links > MAX_LINKS:
            return None
        parts += reversed(PurePosixPath(target.readlink()).parts)
    return done


def _locate(tree: Path, parts: list[str], mounts: dict[str, Path]) -> Path:
    if parts and parts[0] in mounts:
        return mounts[parts[0]].joinpath(*parts[1:])
    return tree.joinpath(*parts)


def find_command(
    tree: Path, command: str, search_path: str, workdir: str, mounts: dict[str, Path] | None = None
) -> str | None:
    """The path inside by which `command` runs, or None when no executable file is there."""
    if "/" in command:
        candidates = [os.path.join(workdir, command)]  # noqa: PTH118 - a path inside the image
    else:
        candidates = [f"{directory}/{command}" for directory in search_path.split(":")]
    for candidate in candidates:
        found = resolve(tree, candidate, mounts)
        if found is not None and found.is_file() and found.stat().st_mode & 0o111:
            return candidate
    return None


def is_file(tree: Path, path: str, workdir: str) -> bool:
    """Whether that path inside, from `workdir` on, is there at all."""
    found = resolve(tree, os.path.join(workdir, path))  # noqa: PTH118
    return found is not None and found.exists() and "/" in path


def find_user(tree: Path, user: str) -> User:
    """The ids that an image's USER means: `uid`, `uid:gid`, `name`, `name:group`; root if empty.

    Raises `UsageError` when the image does not know the name, or the id is above 65,535.
    """
    name, _, group = user.partition(":")
    entries = {entry[0]: entry for entry in _entries(tree, "/etc/passwd", 4)}
    by_id = {entry[2]: entry for entry in entries.values()}
    entry = entries.get(name or "root") or by_id.get(name or "0")
    uid = int(name or "0") if (name or "0").isdigit() else _number(entry, 2, "user", name)
    gid = _find_group(tree, group) if group else (_number(entry, 3, "user", name) if entry else 0)
    login = entry[0] if entry else ""
    groups = () if group else tuple(_groups_of(tree, login, gid))
    if max(uid, gid, *groups, 0) > LARGEST_ID:
        raise UsageError(f"user {user!r} is above {LARGEST_ID}, the largest id of an instance")
    return User(uid, gid, groups)


def _find_group(tree: Path, group: str) -> int:
    if group.isdigit():
        return int(group)
    entries = {entry[0]: entry for entry in _entries(tree, "/etc/group", 3)}
    return _number(entries.get(group), 2, "group", group)


def _groups_of(tree: Path, login: str, gid: int) -> Iterator[int]:
    for entry in _entries(tree, "/etc/group", 4):
        if login and login in entry[3].split(",") and entry[2] not in ("", str(gid)):
            yield _number(entry, 2, "group", entry[0])


def _number(entry: list[str] | None, index: int, what: str, name: str) -> int:
    if entry is None or not entry[index].isdigit():
        raise UsageError(f"the image has no {what} {name!r}: name one of its own, or use an id")
    return int(entry[index])


def _entries(tree: Path, path: str, fields: int) -> Iterator[list[str]]:
    """The lines of a file like /etc/passwd that have at least this many fields."""
    file = resolve(tree, path)
    if file is None or not file.is_file():
        return
    for line in file.read_text(errors="replace").splitlines():
        entry = line.split(":")
        if len(entry) >= fields:
            yield entry
