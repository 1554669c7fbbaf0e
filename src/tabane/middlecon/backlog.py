"""What waits for a connection that takes nothing for now; without IO."""

from __future__ import annotations

from collections import deque

from tabane.middlecon.frames import KIND_AT, Kind


class Backlog:
    """Frames in their order, the urgent ones before all others. `bytes` is what they are in all."""

    __slots__ = ("_frames", "_urgent", "bytes")

    def __init__(self) -> None:
        self._urgent: deque[bytes] = deque()
        self._frames: deque[bytes] = deque()
        self.bytes = 0

    def put(self, frame: bytes) -> None:
        self._frames.append(frame)
        self.bytes += len(frame)

    def put_urgent(self, frame: bytes) -> None:
        self._urgent.append(frame)
        self.bytes += len(frame)

    def take(self, limit_bytes: int) -> bytes:
        """The next frames, until they are more than `limit_bytes`; nothing if none wait."""
        taken: list[bytes] = []
        size = 0
        for frames in (self._urgent, self._frames):
            while frames and size <= limit_bytes:
                taken.append(frames.popleft())
                size += len(taken[-1])
        self.bytes -= size
        return b"".join(taken)

    def drop_cast(self) -> bool:
        """Give up the oldest cast, whose sender does not ask what became of it, if there is one."""
        for index, frame in enumerate(self._frames):
            if frame[KIND_AT] == Kind.CAST:
                del self._frames[index]
                self.bytes -= len(frame)
                return True
        return False
