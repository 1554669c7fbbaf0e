"""What a member publishes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tabane.errors import Busy, Closed
from tabane.middlecon.connection import TIMEOUT_S, Connection
from tabane.middlecon.frames import GONE, Kind, check_given_name


class OwnState(Mapping[str, bytes]):
    """The small values a member publishes under its name, to those it shares a room with."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._values: dict[str, bytes] = {}

    async def put(self, key: str, value: bytes) -> None:
        """Publish a value; returns when the hub has it. During an outage: with the next session.

        Raises `Busy` when it is over the hub's limits; it is then not kept.
        """
        before = self._values.get(check_given_name(key, "state key"))
        self._values[key] = value
        try:
            await self._tell(key, value, 0)
        except Closed:
            return  # The next session begins by publishing all.
        except Busy:
            if before is None:
                del self._values[key]
            else:
                self._values[key] = before
            raise

    async def delete(self, key: str) -> None:
        """Take a value back. Without such a key, does nothing."""
        if self._values.pop(key, None) is not None:
            try:
                await self._tell(key, b"", GONE)
            except Closed:
                return

    def __getitem__(self, key: str) -> bytes:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    async def _tell(self, key: str, value: bytes, flags: int) -> None:
        text = key.encode()
        await self._connection.request(
            Kind.STATE, TIMEOUT_S, flags=flags, value=len(text), data=text + value
        )

    def publish(self) -> None:
        for key, value in self._values.items():
            text = key.encode()
            self._connection.post(Kind.STATE, value=len(text), data=text + value)
