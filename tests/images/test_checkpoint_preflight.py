"""What refuses a restore, before anything is done for it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tabane.images.checkpoint.manifest import About, lay_out, make_manifest
from tabane.images.checkpoint.preflight import KERNELS_OWN, Here, preflight
from tabane.model import AppName, Class

IMAGE = "sha256:" + "1" * 64
FLAGS = "fpu sse2 avx2 aes constant_tsc rep_good ibpb"
ABOUT = About(
    app=AppName("default/hello"),
    revision=3,
    driver="runc",
    isolation=Class.CONTAINER,
    images=(IMAGE,),
    id_base=100_000,
    machine="x86_64",
    cpu_vendor="AuthenticAMD",
    cpu_flags=FLAGS,
    kernel="6.12.3-amd64",
    versions={"runc": "1.1.5", "criu": "4.2.1"},
)
HERE = Here(
    machine="x86_64",
    kernel="6.12.3-amd64",
    cpu_vendor="AuthenticAMD",
    cpu_flags=frozenset({*FLAGS.split(), "avx512f"}),
    drivers=frozenset({"runc", "qemu"}),
    versions={"runc": "1.1.5", "criu": "4.2.1", "qemu": "7.2"},
    images=frozenset({IMAGE}),
    revision=3,
    id_base=100_000,
    memory_bytes=1 << 30,
)


def check(about: dict[str, Any] | None = None, here: dict[str, Any] | None = None) -> str:
    """The reasons, one a line."""
    stream = lay_out({"pages-1.img": 1 << 20})
    made = msgspec.structs.replace(ABOUT, **(about or {}))
    manifest = make_manifest(made, 1.0, (), stream, ["c" * 64] * stream.windows)
    return "\n".join(preflight(manifest, msgspec.structs.replace(HERE, **(here or {}))))


def test_where_it_was_made_it_can_be_restored() -> None:
    assert check() == ""


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"revision": 4}, "it is of revision 3, and 4 is deployed"),
        (
            {"id_base": 165_536},
            "what is in it belongs to ids from 100000 on, and the app has those from 165536 on",
        ),
        ({"images": frozenset()}, "its image sha256:111111111111 is not here"),
        ({"drivers": frozenset({"qemu"})}, "driver runc cannot restore here"),
        ({"versions": {"runc": "1.1.5"}}, "criu 4.2.1 made it, and there is none here"),
        (
            {"versions": {"runc": "1.1.5", "criu": "4.1"}},
            "criu 4.2.1 made it, and here is 4.1",
        ),
        ({"machine": "aarch64"}, "it is of a machine x86_64, and this is aarch64"),
        (
            {"cpu_vendor": "GenuineIntel"},
            "it is of a processor of AuthenticAMD, and this one is GenuineIntel's",
        ),
        (
            {"cpu_flags": frozenset({"fpu", "sse2"})},
            "its program may use what this processor lacks: aes avx2",
        ),
        (
            {"memory_bytes": 4096},
            "opened it takes 1.0 MiB of memory, and checkpoints may take 4.0 KiB here",
        ),
        (
            {"room_bytes": 4096},
            "it may take 1.0 MiB of the disk, and 4.0 KiB of what checkpoints may take are left "
            "here",
        ),
    ],
)
def test_each_reason(here: dict[str, Any], reason: str) -> None:
    assert check(here=here) == reason


@pytest.mark.parametrize(
    ("kernel", "accept", "reason"),
    [
        ("6.13.0-amd64", True, ""),
        ("6.12.3-cloud-amd64", True, ""),
        ("6.12.10-amd64", True, ""),
        ("6.12.10-amd64", False, "of kernel 6.12.3-amd64, and here is the other 6.12.10-amd64"),
        ("6.12-amd64", True, "of kernel 6.12.3-amd64, and here is the older 6.12-amd64"),
        ("5.19.20-amd64", True, "of kernel 6.12.3-amd64, and here is the older 5.19.20-amd64"),
        ("strange", True, "of kernel 6.12.3-amd64, and here is the older strange"),
    ],
)
def test_another_kernel(kernel: str, accept: bool, reason: str) -> None:
    said = check(here={"kernel": kernel, "accept_newer_kernel": accept})
    assert said == (reason and f"it has state {reason}")


def test_what_a_kernel_of_unknown_version_has_dumped_is_its_own() -> None:
    here = {"kernel": "6.12.3", "accept_newer_kernel": True}
    assert "it has state of kernel strange" in check({"kernel": "strange"}, here)


def test_what_depends_on_nothing_can_be_restored_anywhere() -> None:
    """A machine that was emulated, with a kernel of its own."""
    free = {"cpu_flags": "", "cpu_vendor": "", "kernel": "", "versions": {"qemu": "7.2"}}
    elsewhere = {"cpu_flags": frozenset(), "cpu_vendor": "GenuineIntel", "kernel": "5.10.0"}
    assert check(free, elsewhere) == ""


def test_mitigations_and_other_settings_of_the_kernel_do_not_matter() -> None:
    own = {flag for flag in FLAGS.split() if flag in KERNELS_OWN}
    assert own == {"constant_tsc", "rep_good", "ibpb"}
    assert check(here={"cpu_flags": HERE.cpu_flags - own}) == ""


def test_many_missing_features_are_counted() -> None:
    flags = " ".join(f"f{n}" for n in range(9))
    assert check({"cpu_flags": flags}).endswith("this processor lacks: f0 f1 f2 f3 f4 and 4 more")


def test_all_reasons_are_told_at_once() -> None:
    assert (
        len(check(here={"revision": 4, "kernel": "5.1", "drivers": frozenset()}).split("\n")) == 3
    )
