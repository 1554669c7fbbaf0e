"""A gRPC client for tests: `python grpc_client.py TARGET AUTHORITY`, prints what it got as JSON."""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import grpc

PATIENCE_S = 60.0


def say(error: grpc.RpcError) -> list[Any]:
    return [error.code().name, error.details()]


class Calls:
    """What is asked of the server, and what came of it."""

    def __init__(self, target: str, authority: str) -> None:
        options = [("grpc.default_authority", authority), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.insecure_channel(target, options=options)

    def unary(self, name: str, request: bytes, timeout: float = PATIENCE_S, **options: Any) -> Any:
        call = self.channel.unary_unary(f"/test.Service/{name}")
        return call.with_call(request, timeout=timeout, **options)

    def echo(self) -> Any:
        answer, call = self.unary("Echo", b"hello", metadata=(("x-mine", "7"),))
        first, last = dict(call.initial_metadata()), dict(call.trailing_metadata())
        return [answer.decode(), first["x-first"], last["x-last"], list(last["x-bin-bin"])]

    def big(self) -> Any:
        answer, _ = self.unary("Echo", bytes(range(256)) * (1 << 16))
        return [len(answer), answer == bytes(range(256)) * (1 << 16)]

    def total(self) -> Any:
        call = self.channel.stream_unary("/test.Service/Total")
        return call((b"x" * 50_000 for _ in range(100)), timeout=PATIENCE_S).decode()

    def count(self) -> Any:
        call = self.channel.unary_stream("/test.Service/Count")
        return [int(one) for one in call(b"500", timeout=PATIENCE_S)] == list(range(500))

    def shout(self) -> Any:
        """One after the other: each word is only said when the one before has come back."""
        heard = threading.Semaphore(1)

        def words() -> Any:
            for word in (b"one", b"two", b"three"):
                heard.acquire()
                yield word

        got = []
        for answer in self.channel.stream_stream("/test.Service/Shout")(
            words(), timeout=PATIENCE_S
        ):
            got.append(answer.decode())
            heard.release()
        return got

    def refuse(self) -> Any:
        try:
            self.unary("Refuse", b"")
        except grpc.RpcError as error:
            return [*say(error), dict(error.trailing_metadata())["x-why"]]

    def deadline(self) -> Any:
        call = self.channel.unary_stream("/test.Service/Hang")
        try:
            return [one.decode() for one in call(b"", timeout=0.5)]
        except grpc.RpcError as error:
            cancelled, _ = self.unary("WasCancelled", b"")
            return [say(error)[0], cancelled.decode()]

    def slow_reader(self) -> Any:
        """A stream that nobody reads, and others beside it."""
        stuck = self.channel.unary_stream("/test.Service/Endless")(b"", timeout=PATIENCE_S)
        next(stuck)
        answers = [self.unary("Echo", b"%d" % number)[0] for number in range(50)]
        stuck.cancel()
        return answers == [b"%d" % number for number in range(50)]

    def unknown(self) -> Any:
        try:
            self.unary("Unknown", b"")
        except grpc.RpcError as error:
            return say(error)


def main() -> None:
    calls = Calls(*sys.argv[1:3])
    found = {name: getattr(calls, name)() for name in sys.argv[3:]}
    print(json.dumps(found))
    calls.channel.close()


if __name__ == "__main__":
    main()
