"""The holder: the first process of a node, and the parent of everything on it.

It keeps what must not die with the parts that do the work: the listening sockets, the pipes that
instances write their output to, and the exit statuses of processes. It starts the agent, the hub
and the gateways, hands each its sockets by descriptor, and starts them again when they die; because
the sockets stay open here, a restart refuses no connection and loses no backlog.

The agent asks it (over a unix socket, one JSON object a line) to spawn engines. An engine such as
`runc run -d` ends and leaves the instance behind, which the kernel then gives to the nearest
subreaper: this process. Its pid is in the engine's pid file, which is read when the engine has
ended. The instance may have ended before that, so while such an engine runs, the statuses of all
unknown children are kept: one of them may turn out to be the instance's.

It imports the standard library only, has no threads, and should hardly ever change.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tabane.node.listeners import Listeners
from tabane.node.logfile import LogFile
from tabane.node.parts import Parts, explain, listen_unix, say, spawn
from tabane.unix import open_nothing

PR_SET_CHILD_SUBREAPER = 36
READ_BYTES = 64 << 10
PIPE_BYTES = 1 << 20
"""No less than a pipe can hold, so that one read empties it."""
OUTPUT_BYTES = 64 << 10
REQUEST_BYTES = 4 << 20
OUTBOX_BYTES = 16 << 20
"""A client that lets so much wait for it is taken for dead."""
STOP_TIMEOUT_S = 20.0
PART_ENDS = 100
"""So many ends of parts are remembered for agents that were not there."""

Status = dict[str, int]
"""How a process ended: `{"code": n}` or `{"signal": n}`."""


@dataclass
class Job:
    """An engine command and the instance process it leaves behind."""

    key: str
    pid_file: str | None
    log: LogFile | None
    log_works: bool = True
    output: bytes = b""
    pipes: set[int] = field(default_factory=set)
    engine: int = 0
    finished: Status | None = None
    pid: int = 0
    exited: Status | None = None

    def keep(self, stream: str, data: bytes) -> None:
        """Write output to the log, or gather it; empty `data` is the stream's end."""
        if self.log is None:
            self.output += data[: max(0, OUTPUT_BYTES - len(self.output))]
            return
        try:
            self.log.write(stream, data, time.time_ns())
            self.log_works = True
        except OSError as error:
            if self.log_works:
                say(f"output of {self.key} is lost: {error}")
            self.log_works = False

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = {"key": self.key, "engine": self.engine, "pid": self.pid}
        if self.finished is not None:
            report |= {"finished": self.finished, "output": self.output.decode(errors="replace")}
        if self.exited is not None:
            report["exited"] = self.exited
        return report


@dataclass(eq=False)
class Client:
    """A connection to the control socket: the agent's."""

    sock: socket.socket
    inbox: bytes = b""
    outbox: bytearray = field(default_factory=bytearray)


class Holder:
    """See the module's text. `config` is what `tabane.node.cluster.holder_config` makes."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.selector = selectors.DefaultSelector()
        self.parts = Parts(config["sockets"], config["parts"], self._on_part_end)
        self.part_ends: deque[dict[str, Any]] = deque(maxlen=PART_ENDS)
        self.jobs: dict[str, Job] = {}
        self.engines: dict[int, Job] = {}
        self.instances: dict[int, Job] = {}
        self.strays: dict[int, Status] = {}
        self.clients: set[Client] = set()
        self.stopping_since = 0.0
        self.listeners = Listeners()
        control = listen_unix(config["control"])
        self._on_readable(control, partial(self._on_connect, control))
        if "listeners" in config:
            taking = listen_unix(config["listeners"])
            self._on_readable(taking, partial(self._on_gateway, taking))
        self._watch_signals()

    def _on_readable(self, file: socket.socket | int, callback: Callable[[], None]) -> None:
        self.selector.register(file, selectors.EVENT_READ, callback)

    def _watch_signals(self) -> None:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._on_readable(reader, partial(self._on_signal, reader))

    def run(self) -> None:
        """Serve until TERM; then end the parts, and with them the node."""
        while not (self.stopping_since and self._stopped()):
            if not self.stopping_since:
                self.parts.start_due(time.monotonic())
            for key, _ in self.selector.select(self._pause_s()):
                if self.selector.get_map().get(key.fd) is key:  # else another event closed it
                    key.data()
        for job in list(self.jobs.values()):
            self._close_pipes(job)

    def _pause_s(self) -> float | None:
        """How long to wait for events at most."""
        give_up = self.stopping_since + STOP_TIMEOUT_S if self.stopping_since else None
        due = give_up or self.parts.next_due()
        return max(0.0, due - time.monotonic()) if due is not None else None

    def _stopped(self) -> bool:
        if time.monotonic() - self.stopping_since >= STOP_TIMEOUT_S:
            self.parts.signal(signal.SIGKILL)
            return True
        return not self.parts.running

    # Signals and children

    def _on_signal(self, reader: int) -> None:
        numbers = os.read(reader, 4096)
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self.stopping_since = self.stopping_since or time.monotonic()
            self.parts.signal(signal.SIGTERM)
        self._reap()

    def _reap(self) -> None:
        ended = dict(ended_children())
        for pid in ended.keys() & self.parts.running.keys():
            self.parts.on_end(pid, ended.pop(pid), time.monotonic())
        engines = ended.keys() & self.engines.keys()
        finished = [(self.engines.pop(pid), ended.pop(pid)) for pid in engines]
        self.strays |= ended
        for job, status in finished:
            self._on_engine_end(job, status)
        for pid in self.strays.keys() & self.instances.keys():
            self._on_instance_end(self.instances.pop(pid), self.strays.pop(pid))
        if not any(job.pid_file for job in self.engines.values()):
            self.strays.clear()

    def _on_engine_end(self, job: Job, status: Status) -> None:
        self._drain(job)
        if job.log is None:
            self._close_pipes(job)
        job.finished = status
        if job.pid_file and status == {"code": 0}:
            self._adopt(job, job.pid_file)
        else:
            job.exited = status
        self._tell(job.report())

    def _adopt(self, job: Job, pid_file: str) -> None:
        """Watch the process the engine left behind, named in its pid file."""
        try:
            pid = int(Path(pid_file).read_text())
            if pid <= 0:
                raise ValueError(f"{pid} is no process")
            if is_child(pid):
                self.strays.pop(pid, None)
            elif pid not in self.strays:
                os.kill(pid, 0)
        except (OSError, ValueError) as error:
            job.output += f"pid file {pid_file}: {error}".encode()
            job.exited = {"code": 255}
        else:
            job.pid = pid
            self.instances[pid] = job

    def _on_instance_end(self, job: Job, status: Status) -> None:
        self._drain(job)
        job.exited = status
        self._tell(job.report())

    def _on_part_end(self, name: str, why: object, pause_s: float) -> None:
        if not self.stopping_since:
            end = {"part": name, "at": time.time(), "why": why, "pause_s": pause_s}
            self.part_ends.append(end)
            self._tell(end)

    # Output

    def _open_pipe(self, job: Job, stream: str) -> int:
        """A new pipe whose end for writing is returned; what comes out of it is kept."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        job.pipes.add(reader)
        self._on_readable(reader, partial(self._on_output, job, stream, reader))
        return writer

    def _on_output(self, job: Job, stream: str, pipe: int, size: int = READ_BYTES) -> None:
        try:
            data = os.read(pipe, size)
        except BlockingIOError:
            return
        job.keep(stream, data)
        if not data:
            self._close_pipe(job, pipe)

    def _drain(self, job: Job) -> None:
        """Take what the pipes hold, so that a process's last words are kept before its end is
        told: one read empties a pipe, the next one sees its end."""
        for pipe in list(job.pipes):
            take = self.selector.get_key(pipe).data
            take(size=PIPE_BYTES)
            if pipe in job.pipes:
                take(size=PIPE_BYTES)

    def _close_pipe(self, job: Job, pipe: int) -> None:
        self.selector.unregister(pipe)
        os.close(pipe)
        job.pipes.discard(pipe)
        if not job.pipes and job.log is not None:
            job.log.close()

    def _close_pipes(self, job: Job) -> None:
        """Take what the pipes hold and close them, whoever still writes into them."""
        self._drain(job)
        for pipe in list(job.pipes):
            job.keep(self.selector.get_key(pipe).data.args[1], b"")
            self._close_pipe(job, pipe)

    # The agent's requests

    def _on_connect(self, control: socket.socket) -> None:
        sock, _ = control.accept()
        sock.setblocking(False)
        client = Client(sock)
        self.clients.add(client)
        self._on_readable(sock, partial(self._on_client, client))
        for report in (*(job.report() for job in self.jobs.values()), *self.part_ends):
            self._send(client, report)
        self._send(client, {"re": 0})

    def _on_client(self, client: Client) -> None:
        self._flush(client)
        try:
            data = client.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *requests, client.inbox = (client.inbox + data).split(b"\n")
        for request in requests:
            self._on_request(client, request)
        if not data or len(client.inbox) > REQUEST_BYTES:
            self._drop(client)

    def _on_request(self, client: Client, line: bytes) -> None:
        number = None
        try:
            request = json.loads(line)
            number = request["id"]
            answer = getattr(self, f"do_{request['do']}")(**request["with"])
        except Exception as error:  # whatever is asked, the holder lives
            answer = {"error": explain(error)}
        self._send(client, {"re": number, **answer})

    def do_spawn(
        self,
        key: str,
        argv: list[str],
        env: dict[str, str] | None = None,
        log: str | None = None,
        log_bytes: int = 4 << 20,
        log_files: int = 3,
        pid_file: str | None = None,
    ) -> dict[str, Any]:
        """Start an engine; refuse a key whose engine or instance still runs."""
        previous = self.jobs.get(key)
        if previous is not None and previous.exited is None:
            raise ValueError(f"{key} is running already")
        self.do_forget(key)
        job = Job(key, pid_file, LogFile(Path(log), log_bytes, log_files) if log else None)
        try:
            job.engine = self._spawn_engine(job, argv, os.environ if env is None else env)
        except BaseException:
            self._close_pipes(job)
            if job.log is not None:
                job.log.close()
            raise
        self.jobs[key] = self.engines[job.engine] = job
        self._tell(job.report())
        return {"pid": job.engine}

    def _spawn_engine(self, job: Job, argv: list[str], env: Any) -> int:
        streams = ("stdout", "stderr") if job.log is not None else ("output",)
        ends = [open_nothing()]
        try:
            ends.extend(self._open_pipe(job, stream) for stream in streams)
            actions = [
                (os.POSIX_SPAWN_DUP2, ends[0], 0),
                (os.POSIX_SPAWN_DUP2, ends[1], 1),
                (os.POSIX_SPAWN_DUP2, ends[-1], 2),
            ]
            return spawn(argv, env, actions, setsid=True)
        finally:
            for end in ends:
                os.close(end)

    def do_forget(self, key: str) -> dict[str, Any]:
        job = self.jobs.pop(key, None)
        if job is not None:
            self.engines.pop(job.engine, None)
            self.instances.pop(job.pid, None)
            self._close_pipes(job)
        return {}

    def do_signal(self, key: str, number: int) -> dict[str, Any]:
        job = self.jobs.get(key)
        if job is None or job.exited is not None:
            return {"sent": False}
        try:
            os.kill(job.pid or job.engine, number)
        except ProcessLookupError:
            return {"sent": False}
        return {"sent": True}

    def do_listen(self, addresses: list[str]) -> dict[str, Any]:
        """Have sockets for apps' TCP ports at these addresses, and no others."""
        return {"problems": self.listeners.set(addresses)}

    # The gateways' requests

    def _on_gateway(self, taking: socket.socket) -> None:
        sock, _ = taking.accept()
        sock.setblocking(False)
        self._on_readable(sock, partial(self._on_taking, sock))

    def _on_taking(self, sock: socket.socket) -> None:
        try:
            goes_on = self.listeners.hand_over(sock)
        except OSError:
            goes_on = False
        if not goes_on:
            self.selector.unregister(sock)
            sock.close()

    # Telling the agent

    def _tell(self, report: dict[str, Any]) -> None:
        for client in list(self.clients):
            self._send(client, report)

    def _send(self, client: Client, message: dict[str, Any]) -> None:
        if client not in self.clients:
            return
        waiting = bool(client.outbox)
        client.outbox += json.dumps(message).encode() + b"\n"
        if not waiting:
            self._flush(client)
        elif len(client.outbox) > OUTBOX_BYTES:
            self._drop(client)

    def _flush(self, client: Client) -> None:
        """Write what the client can take; ask to be told when it can take more."""
        try:
            sent = client.sock.send(client.outbox) if client.outbox else 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(client)
            return
        del client.outbox[:sent]
        key = self.selector.get_key(client.sock)
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outbox else 0)
        if key.events != wanted:
            self.selector.modify(client.sock, wanted, key.data)

    def _drop(self, client: Client) -> None:
        """Forget a client that left; the next one is told everything anew."""
        if client in self.clients:
            self.clients.remove(client)
            self.selector.unregister(client.sock)
            client.sock.close()


def ended_children() -> Iterator[tuple[int, Status]]:
    """Reap all children that have ended: pid and status of each."""
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended[0], parse_status(ended[1])


def is_child(pid: int) -> bool:
    """Whether a process is this one's child, also one that has ended and is not reaped yet."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def parse_status(status: int) -> Status:
    """A wait status as `{"code": n}` or `{"signal": n}`."""
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return {"code": os.WEXITSTATUS(status)}


def become_holder() -> None:
    """Inherit orphans below this process, and have descriptors for as many pipes as allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a child subreaper")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """`python -m tabane.node.holder CONFIG.json`"""
    config = json.loads(Path(sys.argv[1]).read_text())
    os.environ.update(config.get("environment", {}))
    become_holder()
    Path("/proc/self/comm").write_text("tabane-holder")  # in `ps`, rather than python
    Holder(config).run()


if __name__ == "__main__":
    main()
