"""The inner loops of a hub in C. Optional: see `native`."""

from collections.abc import Callable, Iterable

from tabane.middlecon.ports import Port
from tabane.middlecon.reactor import Transport
from tabane.middlecon.wire import Wire

def prepare() -> None: ...
def flush(wires: list[Wire]) -> list[Wire]: ...
def fan_out(ports: Iterable[Port], frame: bytes, limit: int) -> list[Port]: ...
def take_in(
    epoll_fd: int, transports: dict[int, Transport], accept: Callable[[int], None]
) -> int: ...
