"""Whether a checkpoint can be restored on a node: decided from its manifest alone, before anything
is frozen, fetched or decrypted. Pure.

Why a saved *process* (CRIU's) wants what it wants, and a saved machine does not:

- Kernel: the process has the kernel's vDSO mapped and calls into it; its C library has asked once
  which system calls there are; what the kernel keeps for it (rseq areas, seccomp filters, socket
  options) comes back only as that kernel's CRIU knows it. An older kernel may lack what the program
  has found to be there, so that is always refused. A newer one keeps the kernel's promise to its
  programs, but CRIU has to patch the vDSO; that is refused as well, unless the node's operator
  accepts it. A virtual machine and gVisor have their own kernel in the image: they name none.
- Processor: libraries pick their routines by CPUID once, at their start, so every feature that the
  program may have seen must be here. More is harmless. Another maker's processor orders its saved
  registers (XSAVE) otherwise, whatever its flags say. What is emulated names neither.
- Engines: the format of an image is its engine's own, and nobody promises it to another version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tabane.images.checkpoint.manifest import About, Manifest, Stored
from tabane.model import Value
from tabane.units import show_size

WORDS_OF_LINUX = """
    cxmmx k6_mtrr cyrix_arr centaur_mcr k8 k7 p3 p4 constant_tsc up art arch_perfmon pebs bts
    rep_good acc_power nopl xtopology tsc_reliable nonstop_tsc cpuid extd_apicid amd_dcm aperfmperf
    rapl nonstop_tsc_s3 tsc_known_freq
    ring3mwait cpuid_fault cpb epb cat_l3 cat_l2 cdp_l3 cdp_l2 hw_pstate proc_feedback sme pti
    intel_ppin ssbd mba sev ibrs ibpb stibp ibrs_enhanced invpcid_single
    tpr_shadow vnmi flexpriority ept vpid vmmcall ept_ad vmcall
    cqm_llc cqm_occup_llc cqm_mbm_total cqm_mbm_local split_lock_detect bus_lock_detect perfmon_v2
    user_shstk debug_swap flush_l1d md_clear arch_capabilities core_capabilities
"""
"""Those of arch/x86/include/asm/cpufeatures.h that Linux fills itself (3, 7, 8, 11, 21), and what
the processor says for the kernel alone."""
KERNELS_OWN = frozenset(WORDS_OF_LINUX.split())
"""Of the flags in /proc/cpuinfo those that tell of the kernel or its settings, not of what a
program can run: new microcode, or a mitigation that is turned off, must not cost a checkpoint."""
SHOWN_FLAGS = 5
RELEASE = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


class Here(Value, frozen=True, omit_defaults=True):
    """What a node is. `drivers`: that can restore here; `images`: digests that are here;
    `revision` and `id_base`: of the app as it is deployed; `memory_bytes`: what opened checkpoints
    may take; `room_bytes`: of the disk quota that could be had, for one that is yet to be stored
    here, else None."""

    machine: str
    kernel: str
    cpu_vendor: str
    cpu_flags: frozenset[str]
    drivers: frozenset[str]
    versions: dict[str, str]
    images: frozenset[str]
    revision: int
    id_base: int
    memory_bytes: int
    room_bytes: int | None = None
    accept_newer_kernel: bool = False


def preflight(checkpoint: Stored | Manifest, here: Here) -> tuple[str, ...]:
    """Why it cannot be restored here, a sentence each; empty when it can."""
    about = checkpoint.about
    return (
        *_check_app(about, here),
        *_check_engine(about, here),
        *_check_kernel(about, here),
        *_check_processor(about, here),
        *_check_room(checkpoint.memory_bytes, here),
    )


def _check_app(about: About, here: Here) -> Iterator[str]:
    if about.revision != here.revision:
        yield f"it is of revision {about.revision}, and {here.revision} is deployed"
    if about.id_base != here.id_base:
        yield (
            f"what is in it belongs to ids from {about.id_base} on, and the app has those from "
            f"{here.id_base} on"
        )
    for image in dict.fromkeys(about.images):
        if image not in here.images:
            yield f"its image {image[:19]} is not here"


def _check_engine(about: About, here: Here) -> Iterator[str]:
    if about.driver not in here.drivers:
        yield f"driver {about.driver} cannot restore here"
    for name, version in about.versions.items():
        found = here.versions.get(name)
        if found is None:
            yield f"{name} {version} made it, and there is none here"
        elif found != version:
            yield f"{name} {version} made it, and here is {found}"


def _check_kernel(about: About, here: Here) -> Iterator[str]:
    if about.kernel in ("", here.kernel):
        return
    newer = _release(here.kernel) >= _release(about.kernel) > ()
    if not (newer and here.accept_newer_kernel):
        kind = "other" if newer else "older"
        yield f"it has state of kernel {about.kernel}, and here is the {kind} {here.kernel}"


def _release(text: str) -> tuple[int, ...]:
    """`6.12.3-amd64` is (6, 12, 3); empty: nobody knows."""
    found = RELEASE.match(text)
    return tuple(int(part or 0) for part in found.groups()) if found else ()


def _check_processor(about: About, here: Here) -> Iterator[str]:
    if about.machine not in ("", here.machine):
        yield f"it is of a machine {about.machine}, and this is {here.machine}"
        return
    if about.cpu_vendor not in ("", here.cpu_vendor):
        yield f"it is of a processor of {about.cpu_vendor}, and this one is {here.cpu_vendor}'s"
    missing = sorted({*about.cpu_flags.split()} - here.cpu_flags - KERNELS_OWN)
    if missing:
        more = len(missing) - SHOWN_FLAGS
        names = " ".join(missing[:SHOWN_FLAGS]) + (f" and {more} more" if more > 0 else "")
        yield f"its program may use what this processor lacks: {names}"


def _check_room(size_bytes: int, here: Here) -> Iterator[str]:
    if size_bytes > here.memory_bytes:
        yield (
            f"opened it takes {show_size(size_bytes)} of memory, and checkpoints may take "
            f"{show_size(here.memory_bytes)} here"
        )
    if here.room_bytes is not None and size_bytes > here.room_bytes:
        yield (
            f"it may take {show_size(size_bytes)} of the disk, and "
            f"{show_size(max(0, here.room_bytes))} of what checkpoints may take are left here"
        )


def parse_processor(cpuinfo: str) -> tuple[str, str]:
    """The vendor and the flags that /proc/cpuinfo tells; empty where it names none (other machines
    than x86). What not every processor of the machine has, nobody can rely on."""
    vendor, common = "", None
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "vendor_id":
            vendor = value.strip()
        elif name.strip() == "flags":
            flags = dict.fromkeys(value.split())
            common = flags if common is None else {f: None for f in common if f in flags}
    return vendor, " ".join(common or ())
