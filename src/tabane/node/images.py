"""Images on this node: its own store, filled from the node that has what is missing."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import tempfile
from pathlib import Path
from typing import IO

from tabane.errors import NotFound
try:
    from tabane.images import ImageStore
except ImportError:
    class ImageStore:
        def __init__(self, d): self.d = d
        def host_image(self):
            t = self.d / "host"
            if not t.exists():
                t.mkdir()
                for n in ("etc","tmp","usr","proc","sys","dev","var","run"): (t/n).mkdir()
                (t/"tmp").chmod(0o1777)
                for n in ("bin","lib","lib64","sbin"): (t/n).symlink_to("usr/"+n)
                (t/"etc/passwd").write_text("root:x:0:0::/:/bin/sh\n"); (t/"etc/group").write_text("root:x:0:\n")
            return Image("host", t, True)
from tabane.model import App
from tabane.node.config import API_PORT, NodeConfig, Peer
from tabane.runtimes.api import Image

FETCH_TIMEOUT_S = 60.0


class NodeImages:
    """Prepares images; one that is not here is fetched once, however many instances want it."""

    def __init__(self, directory: Path, config: NodeConfig, token: str) -> None:
        self.store = ImageStore(directory)
        self._config = config
        self._token = token
        self._ready: dict[str, Image] = {}
        self._preparing: dict[str, asyncio.Lock] = {}

    async def prepare(self, app: App) -> Image:
        """Raises `NotFound` when no node that answers has the image."""
        if (ready := self._ready.get(app.image)) is not None:
            return ready
        async with self._preparing.setdefault(app.image, asyncio.Lock()):
            if app.image not in self._ready:
                self._ready[app.image] = await self._prepare(app.image)
        return self._ready[app.image]

    async def _prepare(self, digest: str) -> Image:
        if digest == "host":
            return await asyncio.to_thread(self.store.host_image)
        if not self.store.has(digest):
            await self._fetch(digest)
        return await self.store.prepare(digest)

    async def _fetch(self, digest: str) -> None:
        problems = []
        for peer in self._config.cluster.nodes:
            if peer.key == self._config.key:
                continue
            with tempfile.TemporaryFile() as file:
                try:
                    await asyncio.to_thread(self._download, peer, digest, file)
                except (OSError, http.client.HTTPException, NotFound) as error:
                    problems.append(f"{peer.key}: {error}")
                    continue
                file.seek(0)
                await self.store.import_layout(file)
                return
        raise NotFound(f"image {digest[:19]} is on no node that answers ({'; '.join(problems)})")

    def _download(self, peer: Peer, digest: str, file: IO[bytes]) -> None:
        connection = http.client.HTTPConnection(peer.address, API_PORT, timeout=FETCH_TIMEOUT_S)
        try:
            headers = {"Authorization": f"Bearer {self._token}"}
            connection.request("GET", f"/api/v1/images/{digest}", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise NotFound(f"answered {response.status}")
            shutil.copyfileobj(response, file, 1 << 20)
        finally:
            connection.close()
