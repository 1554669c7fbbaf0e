"""An HTTP app as a WebAssembly component, for class `unikernel`: it says what was asked."""

import sys

from componentize_py_types import Ok
from wit_world import exports
from wit_world.imports.types import (
    Fields,
    IncomingRequest,
    OutgoingBody,
    OutgoingResponse,
    ResponseOutparam,
)


class IncomingHandler(exports.IncomingHandler):
    """What the world asks for. Its instance is made for one request."""

    served = 0

    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        IncomingHandler.served += 1
        path = request.path_with_query() or "/"
        version = ".".join(map(str, sys.version_info[:2]))
        text = f"hello from Python {version}: {path}, request {IncomingHandler.served} of mine\n"
        response = OutgoingResponse(Fields.from_list([("content-type", b"text/plain")]))
        body = response.body()
        ResponseOutparam.set(response_out, Ok(response))
        with body.write() as stream:
            stream.blocking_write_and_flush(text.encode())
        OutgoingBody.finish(body, None)
