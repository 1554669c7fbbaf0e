"""Every error Tabane raises on purpose.

    TabaneError
    ├── UsageError            you: the request is wrong; repeating it does not help
    │   ├── SpecError         an app file has a mistake (file, line, field)
    │   ├── NotFound          no such app, instance, node, process
    │   ├── Conflict          the thing changed meanwhile, or exists already
    │   ├── Stale             a generation, incarnation or revision that is no longer current
    │   └── Denied            the principal may not do this
    │       └── Unauthenticated   nobody said who is asking
    ├── PeerError             them: the other side of a connection
    │   ├── ProtocolError     it broke the protocol (the connection is over)
    │   ├── Closed            it went away
    │   └── Refused           it answered no, with a reason
    ├── Unavailable           the system, for now: a retry may help (retry_after_s)
    │   ├── Busy              a queue or limit is full
    │   ├── TimedOut          a deadline passed
    │   ├── Unreachable       a node, a data center or the store cannot be reached
    │   └── Asleep            it is frozen; somebody must wake it first
    └── SystemFault           the system: a retry does not help until someone acts
        ├── EngineError       runc, crun, ... failed (argv, exit status, its last words)
        ├── Unsupported       this driver or machine cannot do that (reason)
        └── Corrupt           stored data does not match its digest or schema

An error's text is one sentence: what is wrong, where, and what to do. Data that a caller
may act on are attributes; nobody parses the text. `blame` and `retry` decide REST statuses and
exit codes in one place (see `tabane.api.problems`).
"""

from __future__ import annotations


class TabaneError(Exception):
    """The root. `code` is a stable word for machines; `retry` says whether a repeat may help."""

    code = "error"
    retry = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class UsageError(TabaneError):
    code = "usage"


class SpecError(UsageError):
    """A mistake in an app file. `line` counts from 1; 0 means the file as a whole."""

    code = "spec"

    def __init__(self, file: str, line: int, field: str, problem: str) -> None:
        where = f"{file}:{line}" if line else file
        super().__init__(f"{where}: {field}: {problem}" if field else f"{where}: {problem}")
        self.file = file
        self.line = line
        self.field = field
        self.problem = problem


class NotFound(UsageError):
    code = "not_found"


class Conflict(UsageError):
    code = "conflict"


class Stale(UsageError):
    code = "stale"


class Denied(UsageError):
    code = "denied"


class Unauthenticated(Denied):
    code = "unauthenticated"


class PeerError(TabaneError):
    code = "peer"


class ProtocolError(PeerError):
    code = "protocol"


class Closed(PeerError):
    code = "closed"
    retry = True


class Refused(PeerError):
    """The other side said no. `reason`: the code of the error it raised, as `stale`, if it did."""

    code = "refused"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Unavailable(TabaneError):
    code = "unavailable"
    retry = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Busy(Unavailable):
    code = "busy"


class TimedOut(Unavailable):
    code = "timed_out"


class Unreachable(Unavailable):
    code = "unreachable"


class Asleep(Unavailable):
    code = "asleep"


class SystemFault(TabaneError):
    code = "fault"


class EngineError(SystemFault):
    """An engine failed. `status`: of its exit (negative: a signal), `output`: its last words."""

    code = "engine"

    def __init__(
        self, message: str, *, argv: tuple[str, ...] = (), status: int = 0, output: str = ""
    ) -> None:
        super().__init__(message)
        self.argv = argv
        self.status = status
        self.output = output


class Unsupported(SystemFault):
    code = "unsupported"


class Corrupt(SystemFault):
    code = "corrupt"


def error_of(code: str, message: str, *, otherwise: type[TabaneError] = Refused) -> TabaneError:
    """The error with that code, as another process told it; `otherwise` for a code that is not
    known here. A mistake in a file is a `UsageError`: what else it carries was not told."""
    todo: list[type[TabaneError]] = [TabaneError]
    while todo:
        kind = todo.pop()
        if vars(kind).get("code") == code:
            return UsageError(message) if kind is SpecError else kind(message)
        todo += kind.__subclasses__()
    return otherwise(message)
