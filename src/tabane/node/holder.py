"""The holder: the first process of a node, and the parent of everything on it.

It keeps what must not die with the parts that do the work: the listening sockets, the pipes that
instances write their output to, and the exit statuses of processes. It starts the agent, the hub
and the gateways, hands each its sockets by descriptor, and starts them again when they die; because
the sockets stay open here, a restart refuses no connection and loses no backlog.

The agent asks it (over a unix packet socket, one JSON object a packet) to spawn engines. An engine
such as `runc run -d` ends and leaves the instance behind, which the kernel then gives to the
nearest subreaper: this process. Its pid is in the engine's pid file. All children are reaped in
one loop, and in each turn engines before orphans, so the pid file is read before the status of
the process it names is wanted: an orphan can only become ours after its engine has ended.

It imports the standard library only, has no threads, and should hardly ever change.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabane.node.logfile import LogFile

PR_SET_CHILD_SUBREAPER = 36
IP_FREEBIND = 15
FIRST_SOCKET_FD = 100
"""Sockets are handed to children from this number up; below it their own files fit."""
PACKET_BYTES = 1 << 20
OUTPUT_BYTES = 64 << 10
RESTART_FIRST_S = 0.05
RESTART_LAST_S = 5.0
STOP_TIMEOUT_S = 20.0


@dataclass
class Part:
    """One of Tabane's own processes: agent, hub or gateway."""

    name: str
    argv: list[str]
    sockets: list[str]
    pid: int = 0
    started: float = 0.0
    pause_s: float = RESTART_FIRST_S
    due: float = 0.0


@dataclass
class Job:
    """An engine command and the instance process it leaves behind."""

    key: str
    engine: int
    pid_file: str = ""
    log: LogFile | None = None
    output: bytearray = field(default_factory=bytearray)
    pipes: set[int] = field(default_factory=set)
    finished: dict[str, int] | None = None
    pid: int = 0
    exited: dict[str, int] | None = None

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = {"key": self.key, "engine": self.engine, "pid": self.pid}
        if self.finished is not None:
            report |= {"finished": self.finished, "output": self.output.decode(errors="replace")}
        if self.exited is not None:
            report["exited"] = self.exited
        return report


class Holder:
    """See the module's text. `config` is the node's file (`tabane.node.config`), as plain data."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.selector = selectors.DefaultSelector()
        self.sockets = {entry["name"]: bind_socket(entry) for entry in config["sockets"]}
        self.parts = [Part(p["name"], p["argv"], p["sockets"]) for p in config["parts"]]
        self.environment = dict(os.environ) | config.get("environment", {})
        self.jobs: dict[str, Job] = {}
        self.by_pid: dict[int, Job] = {}
        self.clients: dict[socket.socket, deque[bytes]] = {}
        self.stopping_since = 0.0
        self.control = listen_unix(config["control"], socket.SOCK_SEQPACKET)
        self.selector.register(self.control, selectors.EVENT_READ, self._on_client)
        self._watch_signals()

    def _watch_signals(self) -> None:
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self.selector.register(reader, selectors.EVENT_READ, self._on_signal)

    def run(self) -> None:
        """Serve until TERM; then end the parts, and with them the node."""
        while not (self.stopping_since and self._stopped()):
            self._start_parts()
            for key, _ in self.selector.select(self._next_due()):
                key.data(key.fileobj)

    def _next_due(self) -> float | None:
        if self.stopping_since:
            return max(0.0, self.stopping_since + STOP_TIMEOUT_S - time.monotonic())
        due = [part.due for part in self.parts if not part.pid]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _stopped(self) -> bool:
        if time.monotonic() - self.stopping_since >= STOP_TIMEOUT_S:
            for part in self.parts:
                if part.pid:
                    os.kill(part.pid, signal.SIGKILL)
            return True
        return not any(part.pid for part in self.parts)

    # Parts

    def _start_parts(self) -> None:
        for part in self.parts:
            if not part.pid and not self.stopping_since and part.due <= time.monotonic():
                self._start_part(part)

    def _start_part(self, part: Part) -> None:
        numbered = list(enumerate(part.sockets, FIRST_SOCKET_FD))
        names = ",".join(f"{name}={number}" for number, name in numbered)
        actions = [(os.POSIX_SPAWN_DUP2, self.sockets[name].fileno(), n) for n, name in numbered]
        environment = self.environment | {"TABANE_SOCKETS": names, "TABANE_PART": part.name}
        part.pid = os.posix_spawn(
            part.argv[0], part.argv, environment, file_actions=actions, setsigdef=[signal.SIGPIPE]
        )
        part.started = time.monotonic()

    def _on_part_end(self, part: Part) -> None:
        lived_s = time.monotonic() - part.started
        part.pause_s = RESTART_FIRST_S if lived_s > 10 else min(part.pause_s * 2, RESTART_LAST_S)
        part.pid, part.due = 0, time.monotonic() + part.pause_s

    # Signals and children

    def _on_signal(self, reader: int) -> None:
        numbers = os.read(reader, 4096)
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._stop()
        if signal.SIGCHLD in numbers:
            self._reap()

    def _stop(self) -> None:
        self.stopping_since = self.stopping_since or time.monotonic()
        for part in self.parts:
            if part.pid:
                os.kill(part.pid, signal.SIGTERM)

    def _reap(self) -> None:
        ended: dict[int, dict[str, int]] = {}
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            ended[pid] = parse_status(status)
        for part in self.parts:
            if part.pid in ended:
                self._on_part_end(part)
        engines = [job for job in self.jobs.values() if job.engine in ended and not job.finished]
        for job in engines:
            self._on_engine_end(job, ended[job.engine])
        for pid in ended.keys() & self.by_pid.keys():
            orphan = self.by_pid.pop(pid)
            orphan.exited = ended[pid]
            self._tell(orphan)

    def _on_engine_end(self, job: Job, status: dict[str, int]) -> None:
        for pipe in list(job.pipes) if job.log is None else []:
            self._drain(job, pipe)
        job.finished = status
        if job.pid_file and status == {"code": 0}:
            self._adopt(job)
        elif not job.pid_file:
            job.exited = status
        self._tell(job)

    def _adopt(self, job: Job) -> None:
        """Watch the process the engine left behind, named in its pid file."""
        try:
            job.pid = int(Path(job.pid_file).read_text())
        except (OSError, ValueError) as error:
            job.output += f"its pid file: {error}".encode()
            job.exited = {"code": 255}
        else:
            self.by_pid[job.pid] = job

    # Output

    def _on_output(self, job: Job, name: str, pipe: int) -> None:
        try:
            data = os.read(pipe, OUTPUT_BYTES)
        except BlockingIOError:
            return
        if job.log is not None:
            job.log.write(name, data, time.time_ns())
        else:
            job.output += data[: OUTPUT_BYTES - len(job.output)]
        if not data:
            self._close_pipe(job, pipe)

    def _drain(self, job: Job, pipe: int) -> None:
        """Take what an ended command without a log has left in its pipe."""
        while True:
            try:
                data = os.read(pipe, OUTPUT_BYTES)
            except BlockingIOError:
                data = b""
            if not data:
                return self._close_pipe(job, pipe)
            job.output += data[: OUTPUT_BYTES - len(job.output)]

    def _close_pipe(self, job: Job, pipe: int) -> None:
        self.selector.unregister(pipe)
        os.close(pipe)
        job.pipes.discard(pipe)
        if not job.pipes and job.log is not None:
            job.log.close()

    def _open_pipe(self, job: Job, name: str) -> tuple[int, int]:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        job.pipes.add(reader)
        self.selector.register(
            reader, selectors.EVENT_READ, lambda fd: self._on_output(job, name, fd)
        )
        return reader, writer

    # The agent's requests

    def _on_client(self, control: socket.socket) -> None:
        client, _ = control.accept()
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_BYTES)
        self.clients[client] = deque()
        self.selector.register(client, selectors.EVENT_READ, self._on_request)
        for job in self.jobs.values():
            self._send(client, job.report())

    def _on_request(self, client: socket.socket) -> None:
        self._flush(client)
        try:
            packet = client.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            return self._drop(client)
        request = json.loads(packet)
        try:
            answer = getattr(self, "do_" + request["do"])(**request["with"])
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        self._send(client, {"re": request["id"], **answer})

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
        job = Job(key, 0, pid_file or "", LogFile(Path(log), log_bytes, log_files) if log else None)
        writers = self._open_outputs(job)
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, writers[0], 1),
            (os.POSIX_SPAWN_DUP2, writers[-1], 2),
        ]
        try:
            job.engine = os.posix_spawnp(
                argv[0],
                argv,
                self.environment if env is None else env,
                file_actions=actions,
                setsid=True,
                setsigdef=[signal.SIGPIPE],
            )
        except OSError:
            for pipe in list(job.pipes):
                self._close_pipe(job, pipe)
            raise
        finally:
            for writer in writers:
                os.close(writer)
        self.jobs[key] = job
        return {"pid": job.engine}

    def _open_outputs(self, job: Job) -> list[int]:
        names = ("stdout", "stderr") if job.log is not None else ("output",)
        return [self._open_pipe(job, name)[1] for name in names]

    def do_forget(self, key: str) -> dict[str, Any]:
        job = self.jobs.pop(key, None)
        if job is not None:
            self.by_pid.pop(job.pid, None)
            for pipe in list(job.pipes):
                self._on_output_rest(job, pipe)
        return {}

    def _on_output_rest(self, job: Job, pipe: int) -> None:
        """Write what is left in a log pipe whose owner is being forgotten, then close it."""
        if job.log is None:
            return self._close_pipe(job, pipe)
        self.selector.get_key(pipe).data(pipe)
        if pipe in job.pipes:
            self._close_pipe(job, pipe)
        return None

    def do_signal(self, key: str, number: int) -> dict[str, Any]:
        job = self.jobs.get(key)
        if job is None or job.exited is not None:
            return {"sent": False}
        os.kill(job.pid or job.engine, number)
        return {"sent": True}

    # Telling the agent

    def _tell(self, job: Job) -> None:
        for client in list(self.clients):
            self._send(client, job.report())

    def _send(self, client: socket.socket, message: dict[str, Any]) -> None:
        outbox = self.clients[client]
        outbox.append(json.dumps(message).encode())
        if len(outbox) == 1:
            self._flush(client)

    def _flush(self, client: socket.socket) -> None:
        """Write what the client can take; ask to be told when it can take more."""
        outbox = self.clients.get(client)
        wanted = selectors.EVENT_READ
        while outbox:
            try:
                client.send(outbox[0])
            except BlockingIOError:
                wanted |= selectors.EVENT_WRITE
                break
            except OSError:
                return self._drop(client)
            outbox.popleft()
        if outbox is not None:
            self.selector.modify(client, wanted, self._on_request)
        return None

    def _drop(self, client: socket.socket) -> None:
        """Forget a client that left; the next one is told everything anew."""
        if self.clients.pop(client, None) is not None:
            self.selector.unregister(client)
            client.close()


def parse_status(status: int) -> dict[str, int]:
    """A wait status as `{"code": n}` or `{"signal": n}`."""
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return {"code": os.WEXITSTATUS(status)}


def listen_unix(path: str, kind: int) -> socket.socket:
    """Bind a unix socket for root only. The path may be longer than the kernel's 108 bytes."""
    target = Path(path)
    target.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    before = os.umask(0o177)
    try:
        sock = socket.socket(socket.AF_UNIX, kind)
        sock.bind(f"/proc/self/fd/{directory}/{target.name}")
    finally:
        os.umask(before)
        os.close(directory)
    sock.listen(4096)
    return sock


def bind_socket(entry: dict[str, Any]) -> socket.socket:
    """Bind what the configuration names: `{"name", "kind": "unix"|"tcp"|"udp", "address"}`."""
    if entry["kind"] == "unix":
        sock = listen_unix(entry["address"], socket.SOCK_STREAM)
        if "mode" in entry:
            Path(entry["address"]).chmod(entry["mode"])
        return sock
    host, _, port = entry["address"].rpartition(":")
    kind = socket.SOCK_DGRAM if entry["kind"] == "udp" else socket.SOCK_STREAM
    sock = socket.socket(socket.AF_INET, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if entry.get("freebind"):
        sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
    sock.bind((host, int(port)))
    if kind == socket.SOCK_STREAM:
        sock.listen(4096)
    return sock


def main() -> None:
    """`python -m tabane.node.holder CONFIG.json`"""
    config = json.loads(Path(sys.argv[1]).read_text())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    holder = Holder(config)
    Path(config["pid_file"]).write_text(str(os.getpid()))
    holder.run()


if __name__ == "__main__":
    main()
