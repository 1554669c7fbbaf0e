"""Run by tests as a program: commits into the store at argv[1] for ever, telling each answer.

`k/N` is written to stdout after commit N was acknowledged; a refusal ends it with `refused: ...`.
"""

import asyncio
import itertools
import os
import sys
from pathlib import Path

from tabane.errors import TabaneError
from tabane.store import Put, SqliteStore


async def main(path: Path, writers: int, value_bytes: int, commits: int) -> None:
    store = await SqliteStore.open(path)
    numbers = iter(range(commits)) if commits else itertools.count()

    async def write() -> None:
        for number in numbers:
            await store.commit(
                [Put(f"k/{number}", bytes(value_bytes)), Put("last", b"%d" % number)]
            )
            os.write(1, b"k/%d\n" % number)

    try:
        await asyncio.gather(*(write() for _ in range(writers)))
    except TabaneError as error:
        kept = len((await store.range("k/"))[1])
        os.write(1, f"refused: {type(error).__name__}: {kept}: {error}\n".encode())
    await store.aclose()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
