"""The image `host`: the machine's own /usr under a skeleton, for programs that need no image.

The skeleton has what a merged-/usr system keeps outside of /usr and programs expect: links, empty
directories, users, certificates, the loader's cache and Debian's alternatives. It holds nothing of
the machine's own configuration.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tabane.errors import Unsupported
from tabane.runtimes.api import Image

LINKS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
DIRECTORIES = {
    "dev": 0o755,
    "etc": 0o755,
    "home": 0o755,
    "mnt": 0o755,
    "opt": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "run": 0o755,
    "srv": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "usr": 0o755,
    "var": 0o755,
    "var/cache": 0o755,
    "var/lib": 0o755,
    "var/log": 0o755,
    "var/tmp": 0o1777,
}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
COPIES = (
    "etc/alternatives",
    "etc/ld.so.cache",
    "etc/mime.types",
    "etc/protocols",
    "etc/services",
    "etc/ssl/certs",
)
"""Public by nature; links are copied as links."""


def make_image(directory: Path, incoming: Path) -> Image:
    """Make the skeleton below `directory`, under the hash of what it is, unless it is there.

    Raises `Unsupported` when the machine keeps programs outside of /usr.
    """
    if not Path("/bin").is_symlink():
        raise Unsupported(
            "the image `host` needs a merged /usr: /bin is not a link on this machine"
        )
    place = Path(tempfile.mkdtemp(dir=incoming))
    tree = place / "rootfs"
    _fill(tree)
    final = directory / _hash(tree)
    if not final.exists():
        place.chmod(0o755)
        place.rename(final)
    else:
        shutil.rmtree(place)
    return Image("host", final / "rootfs", host_usr=True)


def _fill(tree: Path) -> None:
    tree.mkdir()
    tree.chmod(0o755)
    for name, mode in DIRECTORIES.items():
        (tree / name).mkdir()
        (tree / name).chmod(mode)
    for name in LINKS:
        if (Path("/") / name).is_symlink():
            (tree / name).symlink_to((Path("/") / name).readlink())
    (tree / "var/run").symlink_to("/run")
    for name, text in FILES.items():
        (tree / name).write_text(text)
        (tree / name).chmod(0o644)
    for name in COPIES:
        _copy(Path("/") / name, tree / name)


def _copy(source: Path, target: Path) -> None:
    for missing in reversed([p for p in target.parents if not p.exists()]):
        missing.mkdir()
        missing.chmod(0o755)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    elif source.exists():
        shutil.copyfile(source, target)
        target.chmod(0o644)


def _hash(tree: Path) -> str:
    """Names, links and contents, in a fixed order."""
    found = hashlib.sha256()
    for directory, names, files in os.walk(tree):
        names.sort()
        for path in (Path(directory, name) for name in sorted((*names, *files))):
            content = b""
            if path.is_symlink():
                content = os.fsencode(path.readlink())
            elif path.is_file():
                content = path.read_bytes()
            found.update(
                b"%s\0%d\0%s" % (os.fsencode(path.relative_to(tree)), len(content), content)
            )
    return found.hexdigest()[:16]
