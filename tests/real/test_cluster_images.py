"""Images in a cluster: from a registry to every node, by the commands that people type."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.real.conftest import LocalCluster, open_to_all, wait_for

from tabane.images import oci
from tabane.node.config import load_cluster
from tabane.testing.layouts import make_manifest, tagged, write_index
from tabane.testing.registries import Registry, running_registry

pytestmark = pytest.mark.real

CONFIG = Path("/etc/containers/registries.conf")
INSECURE = """\
[[registry]]
location = "{host}"
insecure = true
"""
NODES = ("tokyo/tokyo-1", "tokyo/tokyo-2", "osaka/osaka-1", "osaka/osaka-2")
MODULE = b"\0asm\x01\0\0\0"


@pytest.fixture(scope="module")
def registries_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What nodes take for this machine's registries.conf: they see the mounts of this process."""
    file = tmp_path_factory.mktemp("containers") / "registries.conf"
    file.write_text("")
    subprocess.run(("mount", "--bind", str(file), str(CONFIG)), check=True)
    try:
        yield file
    finally:
        subprocess.run(("umount", str(CONFIG)), check=True)


@pytest.fixture(scope="module")
def cluster(
    registries_conf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    cluster = LocalCluster(open_to_all(tmp_path_factory.mktemp("cluster")), ("tokyo", "osaka"), 2)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def registry(
    cluster: LocalCluster, registries_conf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    """On this machine, as nodes reach it; it wants a login."""
    address = str(load_cluster(cluster.root).network.host_address)
    directory = tmp_path_factory.mktemp("registry")
    with running_registry(directory, address=address, login=True) as running:
        registries_conf.write_text(INSECURE.format(host=running.host))
        yield running


def busybox_layer(word: str) -> bytes:
    """A web server, and what it says."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("bin", "etc", "www"):
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        tar.add(shutil.which("busybox") or "", "bin/busybox")
        info = tarfile.TarInfo("www/index.html")
        info.size = len(word)
        tar.addfile(info, io.BytesIO(word.encode()))
    return gzip.compress(file.getvalue())


def put(registry: Registry, directory: Path, word: str, name: str) -> oci.Descriptor:
    """A web server in the registry."""
    command = ["/bin/busybox", "httpd", "-f", "-p", "8000", "-h", "/www"]
    manifest = make_manifest(directory, busybox_layer(word), Cmd=command)
    write_index(directory, tagged(manifest, "image"))
    registry.put(directory, name, login=True)
    return manifest


def write_app(cluster: LocalCluster, name: str, image: str, *more: str) -> str:
    file = cluster.root / f"{name}.toml"
    lines = (f'name = "{name}"', f'image = "{image}"', *more)
    file.write_text("\n".join(lines))
    return str(file)


def where(cluster: LocalCluster, digest: str) -> list[str]:
    images = cluster.api.get("/api/v1/images")["images"]
    return sorted(row["node"] for row in images if row["digest"] == digest)


WEB = ("port = 8000", 'hosts = ["web.test"]', '[resources]\nmemory = "64MiB"')


def test_from_a_registry_to_an_answer(
    cluster: LocalCluster, registry: Registry, tmp_path: Path
) -> None:
    manifest = put(registry, tmp_path / "one", "one", "team/web:1")
    image = f"docker://{registry.host}/team/web:1"
    file = write_app(cluster, "web", image, *WEB)
    refused = cluster.tabane("deploy", file)
    assert refused.code == 1 and "does not let us have" in refused.err, refused

    login = tmp_path / "auth.json"
    login.write_text(registry.auth_file())
    deployed = cluster.tabane("deploy", "--authfile", str(login), file)
    assert deployed.code == 0, deployed
    assert f"pulling from {registry.host}" in deployed.err
    assert cluster.get("web").body == "one"
    assert cluster.get("web", at="osaka").body == "one"
    assert wait_for(lambda: where(cluster, manifest.digest) == sorted(NODES), "it everywhere")
    app = cluster.api.get("/api/v1/apps/default/web")["app"]
    assert (app["image"], app["digest"]) == (image, manifest.digest)
    again = cluster.tabane("deploy", "--authfile", str(login), file)
    assert "nothing was changed" in again.out

    put(registry, tmp_path / "two", "two", "team/web:1")
    assert cluster.get("web").body == "one", "a tag that moves moves no app"
    assert cluster.tabane("deploy", "--authfile", str(login), file).code == 0
    assert wait_for(lambda: cluster.get("web").body == "two", "the new revision")


def test_there_and_back_and_away(cluster: LocalCluster, registry: Registry, tmp_path: Path) -> None:
    login = tmp_path / "auth.json"
    login.write_text(registry.auth_file())
    (tmp_path / "tree/etc").mkdir(parents=True)
    (tmp_path / "tree/etc/motd").write_text("hello")
    brought = cluster.tabane("image", "import", f"rootfs:{tmp_path}/tree", "--node", "tokyo-2")
    assert brought.code == 0, brought
    digest = brought.out.split()[0]
    assert where(cluster, digest) == ["tokyo/tokyo-2"]
    target = f"docker://{registry.host}/team/tree:1"
    pushed = cluster.tabane("image", "push", digest[:20], target, "--authfile", str(login))
    assert (pushed.code, pushed.out) == (0, f"{digest} is {target}\n"), pushed
    assert cluster.tabane("image", "rm", digest).code == 0
    assert where(cluster, digest) == []
    pulled = cluster.tabane("image", "pull", "--all", "--authfile", str(login), target)
    assert pulled.code == 0, pulled
    assert where(cluster, digest) == sorted(NODES)
    inspected = json.loads(cluster.tabane("image", "inspect", target).out)
    assert inspected["digest"] == digest and inspected["source"] == target


def test_what_an_app_uses_stays(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "tree/bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "", tmp_path / "tree/bin/busybox")
    image = f"rootfs:{tmp_path}/tree"
    command = 'command = ["/bin/busybox", "sleep", "1000"]'
    file = write_app(cluster, "sleeper", image, command)
    assert cluster.tabane("deploy", file).code == 0
    digest = cluster.api.get("/api/v1/apps/default/sleeper")["app"]["digest"]
    refused = cluster.tabane("image", "rm", digest)
    assert refused.code == 1 and "is used by default/sleeper" in refused.err
    planned = json.loads(cluster.tabane("image", "gc", "--dry-run", "--json").out)
    assert not [row for row in planned["removed"] if digest in row["digests"]]
    assert cluster.tabane("rm", "sleeper").code == 0
    assert cluster.tabane("image", "rm", digest).code == 0
    assert where(cluster, digest) == []


def test_a_class_that_does_not_run_the_image(cluster: LocalCluster) -> None:
    (cluster.root / "hello.wasm").write_bytes(MODULE)
    refused = cluster.tabane("deploy", write_app(cluster, "module", "wasm:hello.wasm"))
    assert refused.code == 2, refused
    assert "module.toml:2: image: 'wasm:hello.wasm' is a wasm image, and class" in refused.err
    file = write_app(cluster, "module", "wasm:hello.wasm", 'class = "unikernel"')
    assert cluster.tabane("deploy", file).code == 0
    (cluster.root / "hello.wasm").write_bytes(b"#!/bin/sh")
    refused = cluster.tabane("deploy", file)
    assert refused.code == 2 and "is no WebAssembly module or component" in refused.err


def test_unikernels_run_no_image_of_linux(cluster: LocalCluster) -> None:
    lines = ('class = "unikernel"', 'command = ["x"]')
    refused = cluster.tabane("deploy", write_app(cluster, "misfit", "host", *lines))
    assert refused.code == 2 and "is a host image, and class unikernel runs" in refused.err


def test_a_registry_that_is_away(cluster: LocalCluster) -> None:
    address = load_cluster(cluster.root).network.host_address
    file = write_app(cluster, "away", f"docker://{address}:1/team/app:1")
    refused = cluster.tabane("deploy", file)
    assert refused.code == 1 and f"{address}:1 cannot be reached" in refused.err, refused
    assert len(refused.err.splitlines()) == 2, "where it was looked up, and why not"
