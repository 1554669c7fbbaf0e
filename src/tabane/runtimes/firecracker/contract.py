"""What Firecracker's REST API takes and gives, and when: one table, and the questions to it.

The client asks it before it says anything, and the server of the contract tests answers by it, so
that both cannot misunderstand each other. A kind is

    text, number, truth, any    of JSON
    1..32                       a number in that range (either end may be missing)
    Full|Diff                   one of these texts
    [Drive]                     a list
    Drive                       one of `MESSAGES`

and is followed by `!` where the field is required. A call is legal `before` the machine starts,
`after`, or `always`; `ACTIONS` says the same of the three things that `PUT /actions` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tabane.model import Value

BEFORE, AFTER, ALWAYS = "before", "after", "always"

_LIMITER = "RateLimiter"
_MIB = "..4294967295"
_STATS = (
    *("swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory"),
    *("available_memory", "disk_caches", "hugetlb_allocations", "hugetlb_failures", "oom_kill"),
    *("alloc_stall", "async_scan", "direct_scan", "async_reclaim", "direct_reclaim"),
)

MESSAGES: dict[str, dict[str, str]] = {
    "Balloon": {
        "amount_mib": "number!",
        "deflate_on_oom": "truth!",
        "stats_polling_interval_s": "number",
        "free_page_hinting": "truth",
        "free_page_reporting": "truth",
    },
    "BalloonUpdate": {"amount_mib": "number!"},
    "BalloonStats": {
        **dict.fromkeys(("target_pages", "actual_pages", "target_mib", "actual_mib"), "number!"),
        **dict.fromkeys(_STATS, "number"),
    },
    "BalloonStatsUpdate": {"stats_polling_interval_s": "number!"},
    "BalloonStartCmd": {"acknowledge_on_stop": "truth"},
    "BalloonHintingStatus": {"host_cmd": "number!", "guest_cmd": "number"},
    "BootSource": {"kernel_image_path": "text!", "initrd_path": "text", "boot_args": "text"},
    "CpuConfig": {
        "kvm_capabilities": "[text]",
        "cpuid_modifiers": "[CpuidLeafModifier]",
        "msr_modifiers": "[MsrModifier]",
        "reg_modifiers": "[ArmRegisterModifier]",
        "vcpu_features": "[VcpuFeatures]",
    },
    "CpuidLeafModifier": {
        "leaf": "text!",
        "subleaf": "text!",
        "flags": "number!",
        "modifiers": "[CpuidRegisterModifier]!",
    },
    "CpuidRegisterModifier": {"register": "eax|ebx|ecx|edx!", "bitmap": "text!"},
    "MsrModifier": {"addr": "text!", "bitmap": "text!"},
    "ArmRegisterModifier": {"addr": "text!", "bitmap": "text!"},
    "VcpuFeatures": {"index": "number!", "bitmap": "text!"},
    "Drive": {
        "drive_id": "text!",
        "is_root_device": "truth!",
        "partuuid": "text",
        "cache_type": "Unsafe|Writeback",
        "is_read_only": "truth",
        "path_on_host": "text",
        "rate_limiter": _LIMITER,
        "io_engine": "Sync|Async",
        "socket": "text",
    },
    "PartialDrive": {"drive_id": "text!", "path_on_host": "text", "rate_limiter": _LIMITER},
    "Pmem": {
        "id": "text!",
        "path_on_host": "text!",
        "root_device": "truth",
        "read_only": "truth",
        "rate_limiter": _LIMITER,
    },
    "PartialPmem": {"id": "text!", "rate_limiter": _LIMITER},
    "EntropyDevice": {"rate_limiter": _LIMITER},
    "Error": {"fault_message": "text"},
    "FirecrackerVersion": {"firecracker_version": "text!"},
    "FullVmConfiguration": {
        "balloon": "Balloon",
        "boot-source": "BootSource",
        "cpu-config": "CpuConfig",
        "drives": "[Drive]",
        "entropy": "EntropyDevice",
        "logger": "Logger",
        "machine-config": "MachineConfiguration",
        "memory-hotplug": "MemoryHotplugConfig",
        "metrics": "Metrics",
        "mmds-config": "MmdsConfig",
        "network-interfaces": "[NetworkInterface]",
        "pmem": "[Pmem]",
        "vsock": "Vsock",
    },
    "InstanceActionInfo": {"action_type": "FlushMetrics|InstanceStart|SendCtrlAltDel!"},
    "InstanceInfo": {
        "app_name": "text!",
        "id": "text!",
        "state": "Not started|Running|Paused!",
        "vmm_version": "text!",
    },
    "Logger": {
        "level": "Error|Warning|Info|Debug|Trace|Off",
        "log_path": "text",
        "show_level": "truth",
        "show_log_origin": "truth",
        "module": "text",
    },
    "MachineConfiguration": {
        "mem_size_mib": "number!",
        "vcpu_count": "1..32!",
        "cpu_template": "C3|T2|T2S|T2CL|T2A|V1N1|None",
        "smt": "truth",
        "track_dirty_pages": "truth",
        "huge_pages": "None|Transparent|2M",
    },
    "MemoryBackend": {"backend_type": "File|Uffd!", "backend_path": "text!"},
    "MemoryHotplugConfig": {
        "total_size_mib": _MIB,
        "slot_size_mib": "128..4294967295",
        "block_size_mib": "2..4294967295",
    },
    "MemoryHotplugSizeUpdate": {"requested_size_mib": "0..4294967295"},
    "MemoryHotplugStatus": dict.fromkeys(
        (
            *("total_size_mib", "slot_size_mib", "block_size_mib"),
            *("plugged_size_mib", "requested_size_mib"),
        ),
        "number",
    ),
    "Metrics": {"metrics_path": "text!", "emit_id": "truth", "properties": "any"},
    "MmdsConfig": {
        "network_interfaces": "[text]!",
        "version": "V1|V2",
        "ipv4_address": "text",
        "imds_compat": "truth",
    },
    "NetworkInterface": {
        "iface_id": "text!",
        "host_dev_name": "text!",
        "guest_mac": "text",
        "mtu": "68..65535",
        "rx_rate_limiter": _LIMITER,
        "tx_rate_limiter": _LIMITER,
    },
    "PartialNetworkInterface": {
        "iface_id": "text!",
        "rx_rate_limiter": _LIMITER,
        "tx_rate_limiter": _LIMITER,
    },
    "NetworkOverride": {"iface_id": "text!", "host_dev_name": "text!"},
    "RateLimiter": {"bandwidth": "TokenBucket", "ops": "TokenBucket"},
    "SerialDevice": {"serial_out_path": "text", "rate_limiter": "TokenBucket"},
    "SnapshotCreateParams": {
        "snapshot_path": "text!",
        "mem_file_path": "text!",
        "snapshot_type": "Full|Diff",
    },
    "SnapshotLoadParams": {
        "snapshot_path": "text!",
        "mem_backend": "MemoryBackend",
        "mem_file_path": "text",
        "enable_diff_snapshots": "truth",
        "track_dirty_pages": "truth",
        "resume_vm": "truth",
        "network_overrides": "[NetworkOverride]",
        "vsock_override": "VsockOverride",
        "clock_realtime": "truth",
        "huge_pages": "Snapshot|None|Transparent|2M",
    },
    "TokenBucket": {"size": "0..!", "refill_time": "0..!", "one_time_burst": "0.."},
    "Vm": {"state": "Paused|Resumed!"},
    "Vsock": {"guest_cid": "3..!", "uds_path": "text!", "vsock_id": "text"},
    "VsockOverride": {"uds_path": "text!"},
}


class Call(Value, frozen=True):
    """`body` and `answer` are kinds; empty: there is none. `may_lack`: the body may be left out."""

    legal: str
    body: str = ""
    answer: str = ""
    may_lack: bool = False


CALLS: dict[str, Call] = {
    "GET /": Call(ALWAYS, answer="InstanceInfo"),
    "PUT /actions": Call(ALWAYS, "InstanceActionInfo"),
    "GET /balloon": Call(ALWAYS, answer="Balloon"),
    "PUT /balloon": Call(BEFORE, "Balloon"),
    "PATCH /balloon": Call(AFTER, "BalloonUpdate"),
    "GET /balloon/statistics": Call(AFTER, answer="BalloonStats"),
    "PATCH /balloon/statistics": Call(AFTER, "BalloonStatsUpdate"),
    "PATCH /balloon/hinting/start": Call(AFTER, "BalloonStartCmd", may_lack=True),
    "GET /balloon/hinting/status": Call(AFTER, answer="BalloonHintingStatus"),
    "PATCH /balloon/hinting/stop": Call(AFTER),
    "PUT /boot-source": Call(BEFORE, "BootSource"),
    "PUT /cpu-config": Call(BEFORE, "CpuConfig", may_lack=True),
    "PUT /drives/{drive_id}": Call(BEFORE, "Drive"),
    "PATCH /drives/{drive_id}": Call(AFTER, "PartialDrive"),
    "PUT /entropy": Call(BEFORE, "EntropyDevice"),
    "PUT /hotplug/memory": Call(BEFORE, "MemoryHotplugConfig"),
    "PATCH /hotplug/memory": Call(AFTER, "MemoryHotplugSizeUpdate"),
    "GET /hotplug/memory": Call(AFTER, answer="MemoryHotplugStatus"),
    "PUT /logger": Call(BEFORE, "Logger"),
    "GET /machine-config": Call(ALWAYS, answer="MachineConfiguration"),
    "PUT /machine-config": Call(BEFORE, "MachineConfiguration", may_lack=True),
    "PATCH /machine-config": Call(BEFORE, "MachineConfiguration", may_lack=True),
    "PUT /metrics": Call(BEFORE, "Metrics"),
    "GET /mmds": Call(ALWAYS, answer="any"),
    "PUT /mmds": Call(ALWAYS, "any", may_lack=True),
    "PATCH /mmds": Call(ALWAYS, "any", may_lack=True),
    "PUT /mmds/config": Call(BEFORE, "MmdsConfig"),
    "PUT /network-interfaces/{iface_id}": Call(BEFORE, "NetworkInterface"),
    "PATCH /network-interfaces/{iface_id}": Call(AFTER, "PartialNetworkInterface"),
    "PUT /pmem/{id}": Call(BEFORE, "Pmem"),
    "PATCH /pmem/{id}": Call(AFTER, "PartialPmem"),
    "PUT /serial": Call(BEFORE, "SerialDevice"),
    "PUT /snapshot/create": Call(AFTER, "SnapshotCreateParams"),
    "PUT /snapshot/load": Call(BEFORE, "SnapshotLoadParams"),
    "GET /version": Call(ALWAYS, answer="FirecrackerVersion"),
    "PATCH /vm": Call(AFTER, "Vm"),
    "GET /vm/config": Call(ALWAYS, answer="FullVmConfiguration"),
    "PUT /vsock": Call(BEFORE, "Vsock"),
}

ACTIONS = {"InstanceStart": BEFORE, "FlushMetrics": AFTER, "SendCtrlAltDel": AFTER}
PARTIAL = frozenset({"PATCH /machine-config"})
"""What is required may be left out."""
FRESH = frozenset({"PUT /snapshot/load"})
"""Legal only while nothing but logger and metrics was set."""
PAUSED = frozenset({"PUT /snapshot/create"})
"""Legal only while the machine stands still."""

_PARAMETER = re.compile(r"\{(\w+)\}")


def find_call(method: str, path: str) -> tuple[str, dict[str, str]] | None:
    """The key in `CALLS` of a request, and what stands in its path for parameters."""
    for key in CALLS:
        verb, _, form = key.partition(" ")
        if verb == method:
            pattern = _PARAMETER.sub(r"(?P<\1>[^/]+)", form)
            if found := re.fullmatch(pattern, path):
                return key, found.groupdict()
    return None


def is_legal(key: str, body: Any, *, started: bool) -> bool:
    """Whether a call may be made now, as far as that is about the machine's start."""
    legal = CALLS[key].legal
    if key == "PUT /actions" and isinstance(body, dict):
        legal = ACTIONS.get(body.get("action_type", ""), ALWAYS)
    return legal == ALWAYS or (legal == AFTER) == started


def find_faults(key: str, body: Any, parameters: dict[str, str]) -> list[str]:
    """What is wrong with a request's body (None: there is none); nothing when it is right."""
    call = CALLS[key]
    if body is None:
        return [] if call.may_lack or not call.body else ["a body is missing"]
    if not call.body:
        return ["there may be no body"]
    faults = list(_check(call.body, body, "", partial=key in PARTIAL))
    for name, value in parameters.items():
        if isinstance(body, dict) and body.get(name) != value:
            faults.append(f"{name} is not {value!r}, as in the path")
    return faults


def find_answer_faults(key: str, body: Any) -> list[str]:
    """What is wrong with an answer. Fields that are not known may come with a newer version."""
    answer = CALLS[key].answer
    if not answer:
        return []
    return [fault for fault in _check(answer, body, "", partial=False) if "unknown" not in fault]


def _check(kind: str, value: Any, where: str, *, partial: bool) -> Iterator[str]:
    kind = kind.removesuffix("!")
    if kind.startswith("["):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for number, item in enumerate(value):
            yield from _check(kind[1:-1], item, f"{where}[{number}]", partial=False)
    elif kind in MESSAGES:
        yield from _check_message(kind, value, where, partial=partial)
    elif fault := _fault_of(kind, value):
        yield f"{where} {fault}"


def _check_message(name: str, value: Any, where: str, *, partial: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where or 'the body'} is no object"
        return
    fields = MESSAGES[name]
    dot = f"{where}." if where else ""
    yield from (f"{dot}{field} is unknown" for field in value if field not in fields)
    for field, kind in fields.items():
        if field in value:
            yield from _check(kind, value[field], f"{dot}{field}", partial=False)
        elif kind.endswith("!") and not partial:
            yield f"{dot}{field} is missing"


def _fault_of(kind: str, value: Any) -> str:
    if kind == "any":
        return ""
    if kind == "truth":
        return "" if isinstance(value, bool) else "is neither true nor false"
    if kind == "number" or ".." in kind:
        if not isinstance(value, int) or isinstance(value, bool):
            return "is no whole number"
        least, _, most = kind.partition("..")
        low, high = int(least) if least.isdigit() else value, int(most) if most else value
        return "" if low <= value <= high else f"is not in {kind}"
    if not isinstance(value, str):
        return "is no text"
    return "" if kind == "text" or value in kind.split("|") else f"is none of {kind}"
