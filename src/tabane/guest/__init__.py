"""The host's side of the agent in a virtual machine; the agent itself is in C, in `agent/`."""

from tabane.guest.client import Guest, Talk, connect
from tabane.guest.frames import Frame, FrameReader, encode_frame
from tabane.guest.orders import StartOrder, encode_execution, encode_start, encode_transfer

__all__ = [
    "Frame",
    "FrameReader",
    "Guest",
    "StartOrder",
    "Talk",
    "connect",
    "encode_execution",
    "encode_frame",
    "encode_start",
    "encode_transfer",
]
