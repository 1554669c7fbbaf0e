"""Programs that stand in for `firecracker` and `jailer` where there is no KVM: the server of the
contract tests.

    python -m tabane.testing.firecracker DIRECTORY jailer|firecracker ARGUMENTS...

The API answers by `tabane.runtimes.firecracker.contract`: what is not in it, or not legal now, is
refused. Files that are named must be there. The guest is a process of this machine: its programs
run without their images, the main one says what it says on the console and each sidecar into its
log's sockets, they are frozen with the machine, and their end is told as a guest does. The agent
inside answers what a life cycle needs; commands and copies are the real agent's affair, and it
refuses them.

`DIRECTORY/faults.json` says what goes wrong, as `{"refuses": "PUT /entropy"}`:

    refuses    a call that is answered with 400
    dies       a call at which the program ends, with a line in its log
    mute       `api`: nobody listens at the socket; `guest`: nobody does inside
    panics     the guest's kernel does, with that on its console, instead of booting
    floods     the agent says this, in hexadecimal, without end once it has been asked for figures
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tabane.guest.frames import (
    NONCE_BYTES,
    SILENCE,
    VERSION,
    Frame,
    FrameReader,
    Kind,
    encode_frame,
)
from tabane.guest.orders import START_MAGIC, parse_fields
from tabane.runtimes.firecracker.contract import (
    CALLS,
    FRESH,
    PAUSED,
    find_call,
    find_faults,
    is_legal,
)
from tabane.runtimes.firecracker.machine import AGENT_PORT, log_sockets
from tabane.runtimes.qemu.accelerator import GOOD_WORD, TRIAL
from tabane.spec_fields import MAIN
from tabane.supervise import Supervisor
from tabane.unix import connect_unix

FIRECRACKER_VERSION = "1.17.0"
_HEAD = re.compile(rb"(\w+) (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", re.DOTALL)
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
FILES = ("path_on_host", "kernel_image_path", "initrd_path", "log_path", "metrics_path")


class Refusal(Exception):
    """A request is answered with 400 and this text."""


class Machine:
    """One Firecracker. Its paths are those of the jail, which is the working directory."""

    def __init__(self, faults: dict[str, str], tasks: Supervisor) -> None:
        self.state = "Not started"
        self._faults = faults
        self._tasks = tasks
        self._parts: dict[str, Any] = {}
        self._programs: dict[str, subprocess.Popen[bytes]] = {}
        """Of the containers that run, in the order of their start."""
        self._hosts: list[asyncio.StreamWriter] = []
        self.ended = asyncio.Event()

    def answer(self, method: str, path: str, body: Any) -> Any:
        """What a request is answered with, None for 204. Raises `Refusal`."""
        found = find_call(method, path)
        if found is None:
            raise Refusal(f"Invalid request method and/or path: {method} {path}")
        key, parameters = found
        if self._faults.get("dies") == key:
            Path("firecracker.log").write_text(f"[anonymous] killed at {key}\n")
            os._exit(1)
        if self._faults.get("refuses") == key:
            raise Refusal(f"told to refuse {key}")
        started = self.state != "Not started"
        if faults := find_faults(key, body, parameters):
            raise Refusal("; ".join(faults))
        if not is_legal(key, body, started=started):
            when = "after" if started else "before"
            raise Refusal(f"The requested operation is not supported {when} starting the microVM.")
        if key in FRESH and self._parts.keys() - {"/logger", "/metrics"}:
            raise Refusal("Loading a microVM snapshot not allowed after configuring resources.")
        if key in PAUSED and self.state != "Paused":
            raise Refusal("The microVM has to be paused for that.")
        return self._perform(key, path, body)

    def _perform(self, key: str, path: str, body: Any) -> Any:
        match key:
            case "GET /":
                known = {"app_name": "Firecracker", "id": "jailed", "state": self.state}
                return {**known, "vmm_version": FIRECRACKER_VERSION}
            case "GET /version":
                return {"firecracker_version": FIRECRACKER_VERSION}
            case "PUT /actions":
                return self._act(body["action_type"])
            case "PATCH /vm":
                return self._set_state(body["state"])
            case "PUT /snapshot/create":
                Path(f".{body['snapshot_path']}").write_text(json.dumps(self._parts))
                size = self._parts["/machine-config"]["mem_size_mib"] << 20
                with Path(f".{body['mem_file_path']}").open("xb") as memory:
                    memory.truncate(size)
                return None
            case "PUT /snapshot/load":
                return self._load(body)
        if CALLS[key].answer:
            return self._parts.get(path) or {}
        for name in FILES:
            if body and name in body and not Path(f".{body[name]}").exists():
                raise Refusal(f"{name} {body[name]}: No such file or directory (os error 2)")
        self._parts[path] = body
        return None

    def _load(self, body: dict[str, Any]) -> None:
        """Its programs begin anew: this is no snapshot of processes."""
        try:
            parts = json.loads(Path(f".{body['snapshot_path']}").read_text())
            size = Path(f".{body['mem_backend']['backend_path']}").stat().st_size
        except (OSError, ValueError) as error:
            raise Refusal(f"Load snapshot error: {error}") from None
        if size != parts["/machine-config"]["mem_size_mib"] << 20:
            raise Refusal(f"Load snapshot error: the memory has {size} bytes")
        for override in body.get("network_overrides", []):
            parts[f"/network-interfaces/{override['iface_id']}"] |= override
        parts["/vsock"] |= body.get("vsock_override", {})
        self._parts = parts | self._parts
        self.state = "Running" if body.get("resume_vm") else "Paused"
        self._tasks.start("guest", self._run_guest())

    def _act(self, action: str) -> None:
        if action == "InstanceStart":
            for path in ("/boot-source", "/machine-config"):
                if path not in self._parts:
                    raise Refusal(f"Cannot start a microVM without {path}.")
            self.state = "Running"
            self._tasks.start("guest", self._run_guest())
        elif action == "SendCtrlAltDel":
            self.ended.set()

    def _set_state(self, state: str) -> None:
        self.state = "Paused" if state == "Paused" else "Running"
        for program in self._programs.values():
            program.send_signal(signal.SIGSTOP if state == "Paused" else signal.SIGCONT)

    # The guest

    async def _run_guest(self) -> None:
        if "panics" in self._faults:
            print("Kernel panic - not syncing: told to", flush=True)
            self.ended.set()
            return
        if TRIAL in self._parts["/boot-source"]["boot_args"].split():
            print(GOOD_WORD.decode(), flush=True)
            self.ended.set()
            return
        containers = read_order(self._disk("start").read_bytes())
        for number, order in enumerate(containers, 1):
            if order["workdir"] and not Path(order["workdir"]).is_dir():
                which = "" if order["name"] == MAIN else f"container {order['name']}: "
                self._tell_end(f"failed {which}{order['workdir']} is no directory")
                self.ended.set()
                return
            self._start(order, number)
        if self._faults.get("mute") != "guest":
            path = self._parts["/vsock"]["uds_path"]
            await asyncio.start_unix_server(self._serve_vsock, f".{path}")
        await self._end_in_order({order["name"]: order for order in containers})

    def _start(self, order: dict[str, Any], number: int) -> None:
        """What a sidecar says goes to the sockets of its log, the main program's to the console."""
        names = () if order["name"] == MAIN else log_sockets(number)
        logs = [connect_unix(Path(name)) for name in names]
        out, err = [log.fileno() for log in logs] or (None, None)
        self._programs[order["name"]] = subprocess.Popen(
            order["args"],
            env=order["env"],
            preexec_fn=_die_with_parent,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
        for log in logs:
            log.close()

    async def _end_in_order(self, orders: dict[str, Any]) -> None:
        """With the first to end all others are asked to, in reverse of their start."""
        waits = {
            self._tasks.start(name, asyncio.to_thread(program.wait)): name
            for name, program in reversed(self._programs.items())
        }
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        name = next(name for task, name in waits.items() if task.done())
        code = self._programs[name].returncode
        line = f"signal {-code}" if code < 0 else f"exit {code}"
        line += "" if name == MAIN else f" {name}"
        self._tell_end(line)
        for host in self._hosts:
            host.write(encode_frame(Kind.ENDED, 0, f"{line}\n".encode()))
        for other, program in reversed(self._programs.items()):
            program.send_signal(orders[other]["stop_signal"])
            await asyncio.wait([task for task, of in waits.items() if of == other])
        self.ended.set()

    def _disk(self, name: str) -> Path:
        return Path(f".{self._parts[f'/drives/{name}']['path_on_host']}")

    def _tell_end(self, line: str) -> None:
        if self._parts["/drives/end"]["is_read_only"]:
            raise SystemExit("the disk for the end cannot be written")
        with self._disk("end").open("r+b") as disk:
            disk.write(f"{line}\n".encode())

    async def _serve_vsock(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if await reader.readline() == f"CONNECT {AGENT_PORT}\n".encode():
            writer.write(b"OK 1073741824\n")
            self._hosts.append(writer)
            flood = bytes.fromhex(self._faults.get("floods", ""))
            frames = FrameReader()
            with suppress(ConnectionError):
                while data := await reader.read(1 << 16):
                    for frame in frames.feed(data):
                        writer.write(self._say(frame))
                        while flood and frame.kind == Kind.STATS:
                            writer.write(flood)
                            await writer.drain()
        writer.close()

    def _say(self, frame: Frame) -> bytes:
        """The agent's answer."""
        match frame.kind:
            case Kind.HELLO:
                nonce = frame.payload[-NONCE_BYTES:]
                return SILENCE + encode_frame(Kind.WELCOME, 0, struct.pack("<H", VERSION) + nonce)
            case Kind.SIGNAL if MAIN in self._programs:
                self._programs[MAIN].send_signal(int.from_bytes(frame.payload, "little"))
                return b""
            case Kind.STATS:
                numbers = b"".join(
                    struct.pack("<cIQ", tag, 8, number) for tag, number in ((b"p", 1), (b"o", 0))
                )
                return encode_frame(Kind.ANSWER, frame.channel, numbers)
            case Kind.RELEASE:
                Path("released").write_bytes(frame.payload)
                return encode_frame(Kind.ANSWER, frame.channel)
            case Kind.LIMIT | Kind.CLOCK | Kind.RESEED | Kind.HOLD:
                return encode_frame(Kind.ANSWER, frame.channel)
            case Kind.EXEC | Kind.PUT | Kind.GET | Kind.LIST:
                return encode_frame(Kind.REFUSED, frame.channel, b"fthis is not the real agent")
        return b""


def read_order(disk: bytes) -> list[dict[str, Any]]:
    """The containers of a start disk: name, command, environment, directory, stop signal."""
    assert disk.startswith(START_MAGIC), "this is no start disk"
    (length,) = struct.unpack_from("<I", disk, len(START_MAGIC))
    at = len(START_MAGIC) + 4
    containers: list[dict[str, Any]] = []
    for tag, value in parse_fields(disk[at : at + length]):
        text = value.decode(errors="replace")
        if tag == b"N":
            containers.append({"name": text, "args": [], "env": {}, "workdir": ""})
        elif containers and tag == b"a":
            containers[-1]["args"].append(text)
        elif containers and tag == b"e":
            containers[-1]["env"] |= dict([text.partition("=")[::2]])
        elif containers and tag == b"w":
            containers[-1]["workdir"] = text
        elif containers and tag == b"S":
            containers[-1]["stop_signal"] = int.from_bytes(value, "little")
    return containers


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


async def serve(api_socket: str, faults: dict[str, str]) -> None:
    """Be a Firecracker until its machine ends."""
    async with Supervisor("machine") as tasks:
        machine = Machine(faults, tasks)

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                writer.write(await _exchange(reader, machine))
                await writer.drain()
            writer.close()

        if faults.get("mute") != "api":
            await asyncio.start_unix_server(talk, f".{api_socket}")
        await machine.ended.wait()
    os._exit(0)


async def _exchange(reader: asyncio.StreamReader, machine: Machine) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    found = _HEAD.fullmatch(head)
    assert found is not None, head
    length = _LENGTH.search(found[3])
    body = json.loads(await reader.readexactly(int(length[1]))) if length else None
    try:
        answer = machine.answer(found[1].decode(), found[2].decode(), body)
        status = "204 No Content" if answer is None else "200 OK"
    except Refusal as refusal:
        answer, status = {"fault_message": str(refusal)}, "400 Bad Request"
    content = b"" if answer is None else json.dumps(answer).encode()
    lines = (f"HTTP/1.1 {status}", "Server: Firecracker API", f"Content-Length: {len(content)}")
    return "\r\n".join((*lines, "", "")).encode() + content


def jail(arguments: list[str]) -> None:
    """The jailer: checks what it is told, makes the chroot, and starts the program in it, which it
    cannot really lock in there, since that needs this machine's Python."""
    parser = argparse.ArgumentParser("jailer")
    for name in ("id", "exec-file", "chroot-base-dir", "netns"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("uid", "gid"):
        parser.add_argument(f"--{name}", required=True, type=int)
    parser.add_argument("--resource-limit", action="append", default=[])
    parser.add_argument("--new-pid-ns", action="store_true")
    own, _, rest = "\0".join(arguments).partition("\0--\0")
    told = parser.parse_args(own.split("\0"))
    program = Path(told.exec_file)
    assert re.fullmatch("[a-zA-Z0-9-]{1,64}", told.id), f"Invalid id: {told.id}"
    assert program.is_absolute() and program.is_file(), f"{program} is no file"
    assert Path(told.netns).exists(), f"{told.netns} is not there"
    root = Path(told.chroot_base_dir) / program.name / told.id / "root"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(program, root / program.name)
    os.chdir(root)
    if told.new_pid_ns and (child := os.fork()):
        Path(f"{program.name}.pid").write_text(str(child))
        os._exit(0)
    os.execv(program, [str(program), f"--id={told.id}", *rest.split("\0")])


def main(directory: str, role: str, *arguments: str) -> None:
    """See the module's text."""
    if role == "jailer":
        jail([*arguments])
    if "--version" in arguments:
        print(f"Firecracker v{FIRECRACKER_VERSION}, a stand-in")
        return
    file = Path(directory) / "faults.json"
    faults = json.loads(file.read_text()) if file.exists() else {}
    asyncio.run(serve(arguments[arguments.index("--api-sock") + 1], faults))


def install(directory: Path) -> None:
    """Both programs, in a directory that is to be on PATH."""
    for role in ("jailer", "firecracker"):
        script = f'exec {sys.executable} -m tabane.testing.firecracker {directory} {role} "$@"'
        (directory / role).write_text(f"#!/bin/sh\n{script}\n")
        (directory / role).chmod(0o755)


if __name__ == "__main__":
    main(*sys.argv[1:])
