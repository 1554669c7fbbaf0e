"""The apps of `bench/reactive.py`: three servers, for each engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from classes import make_example

ENGINES = {
    "crun": "container",
    "runc": "container",
    "runsc": "sandbox",
    "wasmtime": "unikernel",
    "qemu-microvm": "microvm",
    "qemu": "vm",
}
"""And the class of each."""
SERVERS = {
    "static": "busybox httpd, a static page",
    "apache": "Apache httpd, a static page",
    "slow": "a web application that imports Django, SymPy and more for a second",
}
CALCULATOR = Path(__file__).with_name("apps") / "calculator.py"
MODULES = "/usr/lib/apache2/modules"
LOADED_LATER = "libgcc_s.so.1"
"""Threads end with it."""
APACHE = f"""
mkdir -p /tmp/www && echo hello >/tmp/www/index.html && echo hello >/tmp/www/GPL-3
cat >/tmp/httpd.conf <<'END'
ServerName web
Listen 8080
PidFile /tmp/httpd.pid
ErrorLog /dev/stderr
User #33
Group #33
LoadModule mpm_event_module {MODULES}/mod_mpm_event.so
LoadModule authz_core_module {MODULES}/mod_authz_core.so
LoadModule dir_module {MODULES}/mod_dir.so
DocumentRoot /tmp/www
END
exec apache2 -f /tmp/httpd.conf -D FOREGROUND
"""
STATIC = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/srv"]
APP = """\
name = "{name}"
class = "{isolation}"
driver = "{engine}"
image = {image}
command = {command}
port = 8080
hosts = ["{name}.test"]
allow_emulation = true

[resources]
memory = "256MiB"
pids = 256

[reactive]
{descent}
stop_after = "1h"
start_timeout = "1m"
"""


class Tried(NamedTuple):
    """One server with one engine: the apps of it."""

    engine: str
    server: str
    texts: dict[str, str]
    """App files by name."""
    why_not: str = ""
    """It is not tried."""

    @property
    def isolation(self) -> str:
        return ENGINES[self.engine]

    @property
    def name(self) -> str:
        """Of the app that begins cold, and is frozen."""
        return f"{self.server}-{self.engine}"

    @property
    def saved(self) -> str:
        """Of the one that is saved."""
        return f"saved-{self.name}"


def make_tried(place: Path) -> list[Tried]:
    """All there is; images are made below `place`."""
    tree = make_tree(place / "image")
    module = make_example("wasm-c", "hello.wasm", place)
    return [make_one(e, s, tree, module) for e in ENGINES for s in SERVERS]


def make_one(engine: str, server: str, tree: Path, module: Path) -> Tried:
    is_machine = ENGINES[engine] in ("microvm", "vm")
    if engine == "wasmtime":
        if server != "static":
            return Tried(engine, server, {}, "WASI programs only: a CGI program in C stands for it")
        return with_texts(engine, server, f"wasm:{module}", [])
    if is_machine and server == "slow":
        return Tried(engine, server, {}, "emulated, its imports take half a minute")
    command = {
        "static": STATIC,
        "apache": ["/bin/busybox", "sh", "-ec", APACHE],
        "slow": ["python3", "-c", CALCULATOR.read_text()],
    }[server]
    image = "host" if server == "slow" else f"rootfs:{tree}"
    return with_texts(engine, server, image, command)


def with_texts(engine: str, server: str, image: str, command: list[str]) -> Tried:
    tried = Tried(engine, server, {})
    descents = {tried.name: 'freeze_after = "100ms"', tried.saved: "checkpoint = true"}
    for name, descent in descents.items():
        text = APP.format(
            name=name,
            isolation=ENGINES[engine],
            engine=engine,
            image=json.dumps(image),
            command=json.dumps(command),
            descent=descent,
        )
        tried.texts[name] = text if command else text.replace("command = []\n", "")
    return tried


def make_tree(tree: Path) -> Path:
    """An image with busybox, a page, and Apache with what it loads."""
    for name in ("bin", "srv", "etc", "tmp", "usr/sbin", "usr/bin", MODULES.lstrip("/")):
        (tree / name).mkdir(parents=True)
    (tree / "tmp").chmod(0o1777)
    for name in ("index.html", "GPL-3"):
        (tree / "srv" / name).write_text("hello\n")
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    for applet in ("sh", "mkdir", "cat"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n")
    (tree / "etc/group").write_text("root:x:0:\nwww-data:x:33:\n")
    modules = (f"{MODULES}/mod_{name}.so" for name in ("mpm_event", "authz_core", "dir"))
    for program in ("/usr/sbin/apache2", *modules):
        copy_with_libraries(Path(program), tree)
    return tree


def copy_with_libraries(program: Path, tree: Path) -> None:
    """To where it is here, with what the loader will look for."""
    done = subprocess.run(("ldd", str(program)), capture_output=True, text=True, check=True)
    needed = [Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)]
    later = [each.parent / LOADED_LATER for each in needed if each.name.startswith("libc.")]
    for path in (program, *needed, *later):
        target = tree / str(path).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
