"""A hub with links: `python -m peers.linked_hub NAME URL PEER=URL ...`"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from tabane.middlecon import Hub


async def main(name: str, url: str, *peers: str) -> None:
    async with Hub(name, listen=[url]) as hub:
        for peer in peers:
            hub.link(*peer.split("="))
        print("listening", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
