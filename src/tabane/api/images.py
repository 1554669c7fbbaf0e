"""The routes about images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse

from tabane.api.checks import check_digest, check_text
from tabane.api.presence import BodyReader
from tabane.api.problems import to_body
from tabane.api.removing import have_done, note, sum_up
from tabane.api.shapes import Body, Json, who_asks
from tabane.errors import Conflict, Corrupt, NotFound, SystemFault, TabaneError, UsageError
from tabane.images.registry import Progress, Tell
from tabane.node import messages as say
from tabane.node.images import OwnImages, Wanted, images_of
from tabane.references import parse_reference
from tabane.supervise import Supervisor

if TYPE_CHECKING:
    from tabane.node.agent import Agent

ASK_S = 5.0
HINT = "look with `tabane image ls`"
LONGEST_AUTH = 64 << 10
AGAIN_S = 10.0
"""So often at the least it is said how far a pull is: much sooner than `peers.SILENCE_S`."""


class PullBody(Body):
    """`source`: an image in a registry (`docker://...`); or `digest`: of one that other nodes have.
    With both: that image, and where else it is. `auth`: logins for the registry, as an auth file's
    text, for this once. `here`: said by a node that has this one get it."""

    source: str = ""
    digest: str = ""
    auth: str = ""
    here: bool = False


class PushBody(Body):
    """`target`: where to, as `docker://HOST/REPOSITORY:TAG`; `auth`: as of a pull."""

    digest: str
    target: str
    auth: str = ""


class CollectBody(Body):
    """`dry_run`: only say what would be removed. `node`: only of this one."""

    dry_run: bool = False
    node: str = ""


def add_images(router: APIRouter, agent: Agent) -> None:
    _add_own(router, agent)
    _add_registries(router, agent)
    _add_all(router, agent)


def _add_own(router: APIRouter, agent: Agent) -> None:
    @router.post("/images", status_code=201)
    async def take(request: Request, source: str = "", size: int = 0) -> Response:
        """An OCI image layout as a tar stream, of `size` bytes; every digest is checked. `source`:
        what it is called in lists."""
        name = check_text("source", source)
        try:
            digest = await agent.images.take(BodyReader(request).blocks(), name, size)
        except Corrupt as error:
            raise UsageError(error.message) from None
        return Json(_describe(agent, digest), 201)

    @router.get("/images/{digest}")
    async def give(digest: str) -> Response:
        """The same, of this node's."""
        blocks = agent.images.store.export(check_digest(digest))
        return StreamingResponse(blocks, media_type="application/x-tar")

    @router.get("/images/{digest}/description")
    async def describe(digest: str) -> Response:
        """What it is, with its manifest and its configuration."""
        store = agent.images.store
        said = _describe(agent, check_digest(digest))
        return Json(said | {"manifest": store.manifest(digest), "config": store.config(digest)})

    @router.get("/blobs/{digest}")
    async def blob(digest: str) -> Response:
        """One blob, for another node."""
        path = agent.images.store.blob(check_digest(digest))
        if not path.exists():
            raise NotFound(f"blob {digest} is not on {agent.config.key}")
        return FileResponse(path, media_type="application/octet-stream")


def _describe(agent: Agent, digest: str) -> dict[str, Any]:
    image = agent.images.store.describe(digest)
    return {"node": agent.config.key, **msgspec.structs.asdict(image)}


def _add_registries(router: APIRouter, agent: Agent) -> None:
    @router.post("/images/pull")
    async def pull(body: PullBody, request: Request) -> Response:
        """Have an image on this node: a JSON object a line, how far it is (`step`), and at last
        the image, or an `error`."""
        wanted = _check_wanted(body)
        if not body.here:
            note(agent, who_asks(request), "image-pull", wanted.source or wanted.digest)

        async def work(tell: Tell) -> dict[str, Any]:
            return _describe(agent, await agent.images.pull(wanted, tell))

        return StreamingResponse(tell_progress(work), media_type="application/x-ndjson")

    @router.post("/images/push")
    async def push(body: PushBody, request: Request) -> Response:
        """Send one of this node's images to a registry; answers as `pull`."""
        digest, target = check_digest(body.digest), parse_reference(body.target)
        auth = _check_auth(body.auth)
        agent.images.store.blobs(digest)
        note(agent, who_asks(request), "image-push", f"{digest} to {target}")

        async def work(tell: Tell) -> dict[str, Any]:
            await agent.images.push(digest, target, auth, tell)
            return _describe(agent, digest) | {"target": str(target)}

        return StreamingResponse(tell_progress(work), media_type="application/x-ndjson")


def _check_wanted(body: PullBody) -> Wanted:
    """Raises `UsageError`."""
    if body.digest:
        check_digest(body.digest)
    elif not body.source:
        raise UsageError("source: name an image (docker://...), or give its digest")
    else:
        parse_reference(body.source)
    source = check_text("source", body.source)
    return Wanted(body.digest, source, _check_auth(body.auth), body.here)


def _check_auth(text: str) -> str:
    """Raises `UsageError` for what is no auth file."""
    problem = 'auth: it is no auth file: JSON with "auths", as `skopeo login` writes it'
    if not text:
        return ""
    try:
        if len(text) <= LONGEST_AUTH and "auths" in msgspec.json.decode(text, type=dict[str, Any]):
            return text
    except (msgspec.DecodeError, UnicodeEncodeError):
        pass
    raise UsageError(problem)


async def tell_progress(
    work: Callable[[Tell], Awaitable[dict[str, Any]]],
) -> AsyncIterator[bytes]:
    """The lines of an answer: the latest of what is told, as it can be sent, again after a while
    without news; then the outcome. Who stops to read ends the work."""
    latest = Progress("begin")
    news = asyncio.Event()

    def tell(progress: Progress) -> None:
        nonlocal latest
        latest = progress
        news.set()

    async def outcome() -> dict[str, Any]:
        try:
            return await work(tell)
        except TabaneError as error:
            return to_body(error)
        except OSError as error:
            return to_body(SystemFault(f"the node could not do it: {error}"))
        finally:
            news.set()

    async with Supervisor("image", on_failure=lambda *_: None) as tasks:
        done = tasks.start("work", outcome())
        while not done.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S):
                    await news.wait()
            news.clear()
            if not done.done():
                yield msgspec.json.encode(latest) + b"\n"
        yield msgspec.json.encode(done.result()) + b"\n"


def _add_all(router: APIRouter, agent: Agent) -> None:
    @router.get("/images")
    async def list_images() -> Response:
        """Of all nodes; `stores`: what theirs take and may take; `silent`: those that did not
        say."""
        answers = await agent.ask_all(say.AskImages(), ASK_S)
        told = [msgspec.json.decode(data, type=OwnImages) for data in answers.by_node.values()]
        return Json(
            {
                "images": [_flat(row) for own in told for row in own.images],
                "stores": [own.store for own in told],
                "silent": answers.silent,
            }
        )

    @router.delete("/images/{digest}")
    async def remove(digest: str, request: Request, node: str = "") -> Response:
        """From all nodes, or one. 409: an app names it."""
        check_digest(digest)
        if users := [app.key for app in agent.all_apps() if digest in images_of(app)]:
            problem = f"image {digest[:19]} is used by {', '.join(users)}"
            raise Conflict(f"{problem}: remove the app, or deploy it with another image")
        note(agent, who_asks(request), "image-rm", digest)
        return Json(sum_up(await have_done(agent, say.RemoveImage(digest), node, HINT)))

    @router.post("/images/gc")
    async def collect(body: CollectBody, request: Request) -> Response:
        """Remove what no app names and no instance runs from."""
        if not body.dry_run:
            note(agent, who_asks(request), "image-gc", body.node or "all nodes")
        order = say.CollectImages(body.dry_run)
        return Json(sum_up(await have_done(agent, order, body.node, HINT)))


def _flat(row: Any) -> dict[str, Any]:
    """An image's row without another one inside."""
    fields: dict[str, Any] = msgspec.structs.asdict(row)
    return {"node": row.node, **msgspec.structs.asdict(fields.pop("image")), **fields}
