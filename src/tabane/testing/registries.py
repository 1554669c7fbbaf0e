"""Debian's docker-registry on loopback, for as long as a test wants it."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tabane.images import oci

USER, PASSWORD = "robot", "open sesame"
HTPASSWD = f"{USER}:$2y$05$cfLm9/192NNnUFQi0hPbX.m4LlfYkt5JpVGIsTVv3kEMUMlb3.XDK"
"""As `htpasswd -B` writes it."""
LISTENING = re.compile(r"listening on \S*?:(\d+)")
CONFIG = """\
version: 0.1
log: {{level: info, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: "{directory}/storage"}}
  delete: {{enabled: true}}
http:
  addr: "{address}:0"
"""
TLS = """\
  tls: {{certificate: "{directory}/tls.crt", key: "{directory}/tls.key"}}
"""
AUTH = """\
auth: {{htpasswd: {{realm: tests, path: "{directory}/htpasswd"}}}}
"""


class Registry:
    """A running registry. `host` is its name in references."""

    def __init__(self, host: str, directory: Path) -> None:
        self.host = host
        self._directory = directory

    def blob(self, digest: str) -> Path:
        """Where it keeps a blob, for tests that damage one."""
        digits = oci.check_digest(digest).removeprefix("sha256:")
        blobs = self._directory / "storage/docker/registry/v2/blobs/sha256"
        return blobs / digits[:2] / digits / "data"

    def put(self, layout: Path, name: str, *, login: bool = False, docker: bool = False) -> None:
        """Push the image of a layout directory as `name`, as `team/app:1`; in Docker's form if
        wanted."""
        form = ("--format", "v2s2") if docker else ("--preserve-digests",)
        options = ("--dest-tls-verify=false", "--quiet", *form)
        who = ("--dest-creds", f"{USER}:{PASSWORD}") if login else ()
        target = f"docker://{self.host}/{name}"
        copy = ("skopeo", "copy", "--all", *options, *who, f"oci:{layout}", target)
        subprocess.run(copy, check=True)

    def auth_file(self, password: str = PASSWORD) -> str:
        """What `skopeo login` would write."""
        word = base64.b64encode(f"{USER}:{password}".encode()).decode()
        return json.dumps({"auths": {self.host: {"auth": word}}})


@contextmanager
def running_registry(
    directory: Path, *, address: str = "127.0.0.1", login: bool = False, tls: bool = False
) -> Iterator[Registry]:
    """Run one that keeps its files in `directory`; with `login` only `USER` may do anything; with
    `tls` its certificate is its own."""
    text = CONFIG + (TLS if tls else "") + (AUTH if login else "")
    if tls:
        names = ("-subj", "/CN=registry", "-addext", f"subjectAltName=IP:{address}")
        files = ("-keyout", str(directory / "tls.key"), "-out", str(directory / "tls.crt"))
        make = ("openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", *names, *files)
        subprocess.run(make, check=True, capture_output=True)
    config = directory / "registry.yml"
    config.write_text(text.format(directory=directory, address=address))
    (directory / "htpasswd").write_text(f"{HTPASSWD}\n")
    argv = ("docker-registry", "serve", str(config))
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    reader = threading.Thread(target=process.stdout.read)  # a full pipe would hold it up
    told: list[str] = []
    try:
        for line in process.stdout:
            told.append(line)
            if found := LISTENING.search(line):
                break
        else:
            raise AssertionError(f"docker-registry ended: {''.join(told)}")
        reader.start()
        yield Registry(f"{address}:{found[1]}", directory)
    finally:
        process.terminate()
        process.wait()
        if reader.ident is not None:
            reader.join()
        process.stdout.close()
