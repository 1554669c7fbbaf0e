"""A gRPC server for tests: `python grpc_server.py PORT`. Messages are bytes, as they are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

cancelled = threading.Event()


def echo(request: bytes, context: Any) -> bytes:
    given = dict(context.invocation_metadata())
    context.send_initial_metadata((("x-first", given.get("x-mine", "none")),))
    context.set_trailing_metadata((("x-last", "1"), ("x-bin-bin", b"\0\1")))
    return request


def total(requests: Iterator[bytes], context: Any) -> bytes:
    return b"%d" % sum(map(len, requests))


def count(request: bytes, context: Any) -> Iterator[bytes]:
    for number in range(int(request)):
        yield b"%d" % number


def shout(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    for request in requests:
        yield request.upper()


def refuse(request: bytes, context: Any) -> bytes:
    context.set_trailing_metadata((("x-why", "because"),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not so: ünïcode")


def hang(request: bytes, context: Any) -> Iterator[bytes]:
    context.add_callback(cancelled.set)
    yield b"begun"
    cancelled.wait()


def was_cancelled(request: bytes, context: Any) -> bytes:
    return b"yes" if cancelled.wait(10.0) else b"no"


def endless(request: bytes, context: Any) -> Iterator[bytes]:
    while context.is_active():
        yield b"x" * 100_000


HANDLERS = {
    "Echo": grpc.unary_unary_rpc_method_handler(echo),
    "Total": grpc.stream_unary_rpc_method_handler(total),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Shout": grpc.stream_stream_rpc_method_handler(shout),
    "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
    "Hang": grpc.unary_stream_rpc_method_handler(hang),
    "WasCancelled": grpc.unary_unary_rpc_method_handler(was_cancelled),
    "Endless": grpc.unary_stream_rpc_method_handler(endless),
}


def main() -> None:
    server = grpc.server(
        futures.ThreadPoolExecutor(32),
        options=[("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)],
    )
    handler = grpc.method_handlers_generic_handler("test.Service", HANDLERS)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
