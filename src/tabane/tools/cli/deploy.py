"""`tabane deploy`, `rm`: of one app, or of thousands, batch by batch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tabane.errors import Corrupt, NotFound, SpecError, TabaneError, UsageError
from tabane.tools.cli.common import Parser, app_key, complain, print_json, say, say_silent
from tabane.tools.cli.images import follow, read_auth, send
from tabane.tools.cli.places import placed_app
from tabane.tools.cli.progress import Tell, shown
from tabane.tools.client import Cluster

if TYPE_CHECKING:
    from tabane.images import Packed
    from tabane.model import App

T = TypeVar("T")

BATCH_APPS = 100
"""Stored in one commit; while a node is at one of these, sessions wait for some milliseconds."""
BATCH_BYTES = 256 << 10
MOST_MISTAKES = 20
"""So many are told."""


class File(NamedTuple):
    """An app file, and where its images' paths begin."""

    path: Path
    text: str
    base: Path
    app: App


def deploy(argv: list[str]) -> int:
    parser = Parser(
        "deploy", "Store apps. Returns when they are durable; a request will start each."
    )
    what = "an app file (TOML), or a directory: all *.toml in it; - reads a file from stdin"
    parser.add_argument("files", metavar="file", nargs="+", help=what)
    parser.add_argument("--force", action="store_true", help="a new revision, changed or not")
    parser.add_argument("--dry-run", action="store_true", help="only look for mistakes")
    parser.add_argument("--owner", metavar="USER", help="whose apps these are to be: name or uid")
    parser.add_argument("--authfile", metavar="FILE", help="logins of registries, for this once")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    owner = _uid(args.owner) if args.owner is not None else None
    files = _read_all(_find(args.files))
    _check_apart(files)
    images = Images(None if args.dry_run else Cluster(args.root), read_auth(args.authfile))
    with shown(quiet=args.json) as tell:
        bodies = [_body_of(file, images, tell) for file in files]
    if owner is not None:
        bodies = [body | {"owner": owner} for body in bodies]
    if images.cluster is None:
        return _say_valid(files, bodies, args)
    if len(args.files) == 1 and not _is_directory(args.files[0]):
        body = bodies[0] | {"force": args.force}
        answer = images.cluster.post("/api/v1/apps", body)
        return _say_stored(files[0].app.key, answer, as_json=args.json)
    return _store_all(images.cluster, bodies, args)


def _uid(user: str) -> int:
    """Of this machine's user, or as it stands."""
    import pwd

    if user.isascii() and user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"deploy: there is no user {user} here: give the uid") from None


def _find(names: Sequence[str]) -> list[Path]:
    """The files that are meant, each once. Raises `UsageError` for a directory without one."""
    found: list[Path] = []
    for name in names:
        path = Path("/dev/stdin" if name == "-" else name)
        inside = sorted(path.glob("*.toml")) if _is_directory(name) else [path]
        if not inside:
            raise UsageError(f"deploy: there is no app file (*.toml) in {name}")
        found += inside
    return [*dict.fromkeys(found)]


def _is_directory(name: str) -> bool:
    return os.path.isdir(name)  # noqa: PTH112 - of a name that is too long, pathlib raises


def _read_all(paths: Sequence[Path]) -> list[File]:
    """All of them, or none. Raises the mistake of a single file; of many, tells the mistakes."""
    files, mistakes = [], list[TabaneError]()
    for path in paths:
        try:
            files.append(_parse(path))
        except (SpecError, NotFound) as error:
            mistakes.append(error)
    if not mistakes:
        return files
    if len(paths) == 1:
        raise mistakes[0]
    for mistake in mistakes[:MOST_MISTAKES]:
        complain(mistake.message)
    raise UsageError(f"{len(mistakes)} of {len(paths)} files have mistakes: nothing was stored")


def _parse(path: Path) -> File:
    from tabane import spec

    text = _read(path)
    base = Path.cwd() if path == Path("/dev/stdin") else path.resolve().parent
    return File(path, text, base, spec.parse_app(text, file=str(path)))


def _check_apart(files: Sequence[File]) -> None:
    """What only one app can have, one of these files has. Raises `UsageError`."""
    owners: dict[str, Path] = {}
    for file in files:
        app = file.app
        claims = [app.key, *(f"host {host}" for host in app.hosts)]
        claims += [f"TCP port {tcp.port}" for tcp in app.tcp]
        for claim in claims:
            if owners.setdefault(claim, file.path) != file.path:
                other = owners[claim]
                raise UsageError(f"{file.path}: {claim} is in {other}, too: leave it in one file")


def _body_of(file: File, images: Images, tell: Tell) -> dict[str, Any]:
    """A file as nodes want it, with the digests of its images, which one of them has then."""
    app = file.app
    body: dict[str, Any] = {"text": file.text, "file": str(file.path)}
    body["image"] = images.bring(app.source, file, "image", tell)
    own = {
        each.name: images.bring(each.source, file, f"containers[{number}].image", tell)
        for number, each in enumerate(app.containers, 1)
        if each.source
    }
    return body | ({"images": own} if own else {})


def _say_valid(
    files: Sequence[File], bodies: Sequence[dict[str, Any]], args: argparse.Namespace
) -> int:
    for file, body in zip(files, bodies, strict=True):
        if args.json:
            print_json({"app": file.app.key, "digest": body["image"]})
        else:
            say(f"{file.app.key} is valid")
    return 0


def _say_stored(key: str, answer: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print_json(placed_app(answer))
    else:
        known = ", ".join(answer["known"]) or "none yet"
        done = "stored" if answer["changed"] else "is what the file says, nothing was changed"
        say(f"{key} revision {answer['revision']} {done}; known in {known}")
    for warning in answer["warnings"]:
        complain(f"{key}: {warning}")
    return say_silent(f"data center {dc}" for dc in answer["unreachable"])


def _store_all(cluster: Cluster, bodies: Sequence[dict[str, Any]], args: argparse.Namespace) -> int:
    """Batch by batch; each is stored whole or not at all."""
    rows: list[dict[str, Any]] = []
    known: list[str] = []
    silent: set[str] = set()
    for batch in _batches(bodies, lambda body: len(body["text"])):
        try:
            answer = cluster.post("/api/v1/deployments", {"apps": batch, "force": args.force})
        except TabaneError:
            if rows:
                complain(f"deploy: {len(rows)} of {len(bodies)} apps are stored, the rest is not")
            raise
        rows += answer["apps"]
        known = answer["known"]
        if any(row["changed"] for row in answer["apps"]):  # who knows this commit knows all before
            silent.clear()
        silent.update(answer["unreachable"])
    told = {"known": [dc for dc in known if dc not in silent], "unreachable": sorted(silent)}
    if args.json:
        print_json({"apps": [*map(placed_app, rows)], **told})
    else:
        changed = sum(row["changed"] for row in rows)
        same = len(rows) - changed
        done = f"{changed} apps stored" + (f", {same} are what their files say" if same else "")
        say(f"{done}; known in {', '.join(told['known']) or 'none yet'}")
    for row in rows:
        for warning in row["warnings"]:
            complain(f"{row['namespace']}/{row['name']}: {warning}")
    return say_silent(f"data center {dc}" for dc in told["unreachable"])


def _batches(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    batch: list[T] = []
    size = 0
    for item in items:
        if batch and (len(batch) == BATCH_APPS or size + size_of(item) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += size_of(item)
    if batch:
        yield batch


class Images:
    """What the files' images are now: each is packed, and brought to a node, once. Without a
    cluster only what is made here has a digest."""

    def __init__(self, cluster: Cluster | None, auth: str) -> None:
        self.cluster = cluster
        self._auth = auth
        self._known: dict[tuple[str, Path], str] = {}

    def bring(self, source: str, file: File, field: str, tell: Tell) -> str:
        """Its digest. Mistakes are the file's, in that field."""
        key = source, file.base
        if key not in self._known:
            with _packed(source, file.base, field, file=str(file.path), text=file.text) as packed:
                self._known[key] = _bring(self.cluster, source, packed, self._auth, tell)
        return self._known[key]


def _read(path: Path) -> str:
    """Raises `NotFound` for a file that cannot be read: nothing is wrong in it then."""
    from tabane import spec

    try:
        return spec.read_text(path)
    except SpecError as error:
        if isinstance(error.__cause__, OSError):
            raise NotFound(error.message) from None
        raise


@contextmanager
def _packed(
    source: str, base: Path, field: str = "image", *, file: str, text: str
) -> Iterator[Packed | None]:
    """An image that is made here; None for one that nodes have or get. Mistakes are the file's, in
    that field."""
    from tabane import spec
    from tabane.spec_readers import Mistake

    if not _is_made_here(source):
        yield None
        return
    from tabane.images import pack

    try:
        packed = pack(source, base)
    except (Corrupt, UsageError) as error:
        raise spec.error_of(Mistake(field, error.message), file=file, text=text) from None
    except OSError as error:
        problem = Mistake(field, f"{error.filename} cannot be read: {error.strerror}")
        raise spec.error_of(problem, file=file, text=text) from None
    with packed:
        yield packed


def _is_made_here(source: str) -> bool:
    return source != "host" and not source.startswith("docker://")


def _bring(
    cluster: Cluster | None, source: str, packed: Packed | None, auth: str, tell: Tell
) -> str:
    """Have a node get an image, or send it; returns its digest. Without a cluster only what is made
    here has one."""
    if packed is not None:
        return str(send(cluster, packed, source, tell)["digest"]) if cluster else packed.digest
    if cluster is None or not source.startswith("docker://"):
        return source
    return str(follow(cluster, "pull", {"source": source, "auth": auth}, tell)["digest"])


def rm(argv: list[str]) -> int:
    parser = Parser("rm", "Remove apps; their instances are drained and stopped.")
    parser.add_argument("apps", metavar="app", nargs="+")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    keys = [*dict.fromkeys(map(app_key, args.apps))]
    cluster = Cluster(args.root)
    if len(keys) == 1:
        answer = cluster.delete(f"/api/v1/apps/{keys[0]}")
        what = {"app": answer.pop("name"), **answer}
    else:
        answer = _remove_all(cluster, keys)
        what = {"apps": keys, **answer}
    if args.json:
        print_json(what)
    else:
        removed = keys[0] if len(keys) == 1 else f"{len(keys)} apps"
        say(f"{removed} removed; known in {', '.join(answer['known']) or 'none yet'}")
    return say_silent(f"data center {dc}" for dc in answer["unreachable"])


def _remove_all(cluster: Cluster, keys: list[str]) -> dict[str, Any]:
    """Batch by batch; each is removed whole or not at all. Returns the last answer."""
    answer: dict[str, Any] = {}
    done = 0
    for batch in _batches(keys, len):
        try:
            answer = cluster.post("/api/v1/removals", {"apps": batch})
        except TabaneError:
            if done:
                complain(f"rm: {done} of {len(keys)} apps are removed, the rest is not")
            raise
        done += len(batch)
    return {name: answer[name] for name in ("known", "unreachable")}
