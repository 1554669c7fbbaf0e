"""Images on this node: its own store, filled from the node that has what is missing."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import AsyncIterator, Generator
from contextlib import closing
from pathlib import Path

from tabane.errors import Corrupt, NotFound
from tabane.images import ImageStore
from tabane.node.config import API_PORT, NodeConfig, Peer
from tabane.runtimes.api import Image

FETCH_TIMEOUT_S = 60.0
BLOCK_BYTES = 1 << 20


class NodeImages:
    """Prepares images; one that is not here is fetched once, however many instances want it."""

    def __init__(self, directory: Path, config: NodeConfig, token: str) -> None:
        self.store = ImageStore(directory)
        self._config = config
        self._token = token
        self._fetching: dict[str, asyncio.Lock] = {}

    async def prepare(self, digest: str) -> Image:
        """An image by digest, or `host`. Raises `NotFound` when no node that answers has it."""
        if digest != "host" and not self.store.has(digest):
            async with self._fetching.setdefault(digest, asyncio.Lock()):
                if not self.store.has(digest):
                    await self._fetch(digest)
            self._fetching.pop(digest, None)
        return await self.store.prepare(digest)

    async def _fetch(self, digest: str) -> None:
        problems = []
        for peer in self._config.cluster.nodes:
            if peer.key != self._config.key:
                try:
                    await self.store.import_layout(self._download(peer, digest))
                except (OSError, http.client.HTTPException, NotFound, Corrupt) as error:
                    problems.append(f"{peer.key}: {error}")
                else:
                    return
        raise NotFound(f"image {digest[:19]} is on no node that answers ({'; '.join(problems)})")

    async def _download(self, peer: Peer, digest: str) -> AsyncIterator[bytes]:
        with closing(self._blocks(peer, digest)) as blocks:
            while block := await asyncio.to_thread(next, blocks, b""):
                yield block

    def _blocks(self, peer: Peer, digest: str) -> Generator[bytes, None, None]:
        connection = http.client.HTTPConnection(peer.address, API_PORT, timeout=FETCH_TIMEOUT_S)
        try:
            headers = {"Authorization": f"Bearer {self._token}"}
            connection.request("GET", f"/api/v1/images/{digest}", headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise NotFound(f"it answered {response.status}")
            while block := response.read(BLOCK_BYTES):
                yield block
        finally:
            connection.close()
