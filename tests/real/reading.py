"""What runs of one driver, to be read back: its instance, its processes, the world around it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from tests.real.conftest import LocalCluster, to_toml

from tabane.model import Class, Resources
from tabane.network import netlink
from tabane.network.netlink import Rtnetlink
from tabane.runtimes.cgroups import Cgroup
from tabane.testing.containers import make_tree

HERE = Path(__file__).parent
NODE = "tokyo/tokyo-1"
LIMITS = Resources(cpu=0.5, memory_bytes=64 << 20, pids=48, disk_bytes=4 << 20)
IDS = 65536
PAGE = "it is read\n"
LONG_S = 60
OUTSIDE = IPv4Address("198.51.100.7")
PORT = 8080
DNS_PORT = 53
NAME_AND_ADDRESS = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4" + OUTSIDE.packed


@dataclass
class Subject:
    """One instance, of an app that may not reach the outside."""

    cluster: LocalCluster
    driver: dict[str, Any]
    """As `tabane doctor` has it."""
    instance: dict[str, Any]

    @cached_property
    def node(self) -> int:
        """The pid of the node's first process."""
        return self.cluster.holder(NODE)

    @property
    def name(self) -> str:
        return str(self.driver["driver"])

    @property
    def can_exec(self) -> bool:
        return bool(self.driver["capabilities"].get("exec"))

    @property
    def own_kernel(self) -> bool:
        return self.driver["class"] in (Class.MICROVM, Class.VM)

    @property
    def address(self) -> str:
        return str(self.instance["address"])

    @cached_property
    def cgroup(self) -> Cgroup:
        return Cgroup(self.instance["cgroup"])

    def pids(self) -> list[int]:
        """Of all that is in its cgroup: its program, and what runs it."""
        found = self.cgroup.pids()
        assert found, f"{self.name} has no process in {self.cgroup.path}"
        return found

    def statuses(self) -> dict[int, dict[str, str]]:
        """`/proc/PID/status` of each."""
        return {pid: read_status(pid) for pid in self.pids()}

    def inside(self, *argv: str, user: str = "") -> tuple[int, str]:
        options = ("--user", user) if user else ()
        ended = self.cluster.tabane("exec", *options, self.instance["id"], "--", *argv)
        return ended.code, ended.out

    def busybox(self, *argv: str, timeout_s: int = LONG_S) -> tuple[int, str]:
        """Run an applet inside, or where no command can be, in the network namespace of its first
        process, with all rights there."""
        timed = ("busybox", "timeout", str(timeout_s), "busybox", *argv)
        if self.can_exec:
            return self.inside(*timed)
        entering = ("nsenter", f"--net=/proc/{self.pids()[0]}/ns/net", "--")
        done = subprocess.run((*entering, *timed), capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout

    def get(self, address: str, port: int, timeout_s: int = LONG_S) -> tuple[int, str]:
        """An HTTP request from inside, as for the app itself."""
        header = ("--header", f"Host: {self.name}.test")
        url = f"http://{address}:{port}/"
        return self.busybox("wget", "-qO-", *header, url, timeout_s=timeout_s)

    def images(self) -> dict[str, str]:
        """The node's unpacked images: file -> digest."""
        trees = self.cluster.root / "nodes" / NODE / "images/trees"
        files = [path for path in trees.rglob("*") if path.is_file() and not path.is_symlink()]
        return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


def read_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def namespace(pid: int, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def make_image(directory: Path) -> Path:
    """A tree with busybox, and `inside.c` twice: as it is, and to be run as root by anyone."""
    tree = make_tree(directory).tree
    (tree / "srv/index.html").write_text(PAGE)
    (tree / "srv/kept").write_text("the image's")
    plain, gaining = tree / "bin/inside", tree / "bin/gaining"
    compiler = ("gcc", "-O1", "-static", "-Wall", "-Wextra", "-o", str(plain))
    subprocess.run((*compiler, str(HERE / "inside.c")), check=True, timeout=60)
    shutil.copy(plain, gaining)
    gaining.chmod(0o4755)
    return tree


def make_example(name: str, directory: Path) -> Path:
    """The program that an example makes, made in a copy of it."""
    copy = directory / name
    shutil.copytree(HERE.parents[1] / "examples" / name, copy)
    subprocess.run(("make", "-s", "-B", "-C", str(copy)), check=True, timeout=60)
    return copy / "hello.wasm"


def deploy(cluster: LocalCluster, driver: dict[str, Any], image: str, place: Path) -> Subject:
    """An app of this driver that answers at port 80, and its instance."""
    name = driver["driver"]
    top: dict[str, Any] = {"name": name, "class": driver["class"], "driver": name, "image": image}
    top |= {"port": 80, "hosts": [f"{name}.test"], "allow_emulation": True}
    if not image.startswith("wasm:"):
        top["command"] = ["busybox", "httpd", "-f", "-p", "80", "-h", "/srv"]
    sections: dict[str, dict[str, Any]] = {
        "resources": {
            "cpu": LIMITS.cpu,
            "memory": f"{LIMITS.memory_bytes >> 20}MiB",
            "pids": LIMITS.pids,
            "disk": f"{LIMITS.disk_bytes >> 20}MiB",
        },
        "network": {"egress": False},
        "reactive": {"stop_after": "1h", "start_timeout": "100s", "stop_timeout": "1s"},
    }
    file = place / f"{name}.toml"
    file.write_text(to_toml(top, sections))
    done = cluster.tabane("deploy", str(file))
    assert done.code == 0, done.err
    return Subject(cluster, driver, cluster.wake(name, path="/"))


class Outside(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"outside")

    def log_message(self, *_: object) -> None:
        """Tests are silent."""


@contextmanager
def outside() -> Iterator[None]:
    """A web server and a resolver that are in no network of the cluster's."""
    with Rtnetlink() as machine:
        machine.perform([netlink.add_address(netlink.LOOPBACK_INDEX, OUTSIDE, 32)])
    web = ThreadingHTTPServer((str(OUTSIDE), PORT), Outside)
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind((str(OUTSIDE), DNS_PORT))
    threads = [
        threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.02}),
        threading.Thread(target=answer_names, args=(names,)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        web.shutdown()
        web.server_close()
        names.sendto(b"", (str(OUTSIDE), DNS_PORT))
        for thread in threads:
            thread.join()
        names.close()


def answer_names(sock: socket.socket) -> None:
    """Every name has one address, until a question is empty."""
    while True:
        question, asker = sock.recvfrom(1500)
        if not question:
            return
        head = question[:2] + b"\x81\x80\0\1\0\1\0\0\0\0"
        sock.sendto(head + question[12:] + NAME_AND_ADDRESS, asker)


def sockets_below(pid: int) -> list[str]:
    """The unix sockets in a process's file systems, other than the kernel's and the programs'."""
    root = Path(f"/proc/{pid}/root")
    found = []
    for place, directories, files in os.walk(root):
        if Path(place) == root:
            for name in ("proc", "sys", "usr", "lib", "lib64"):
                if name in directories:
                    directories.remove(name)
        found += [f"{place}/{name}" for name in files if Path(place, name).is_socket()]
    return found
