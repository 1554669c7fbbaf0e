"""How each default is read back from what runs: from the node, and from inside, if one gets there.

`OUTER` looks at all processes in the instance's cgroup, its program and what runs it alike; `INNER`
has a command inside find out. A driver that says it enforces a default meets all there is for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.real.conftest import wait_for
from tests.real.reading import (
    IDS,
    LIMITS,
    OUTSIDE,
    PAGE,
    PORT,
    Subject,
    namespace,
    read_status,
    sockets_below,
)

from tabane.network.addresses import GATEWAY
from tabane.node.control import FIRST_ID_BASE
from tabane.runtimes.bundle import DEFAULT_CAPABILITIES
from tabane.runtimes.machines.parts import BASE_THREADS
from tabane.runtimes.machines.sizes import OVERHEAD_BYTES, memory_for
from tabane.runtimes.rootfs import OWN_BYTES
from tabane.runtimes.runsc import formats
from tabane.runtimes.unikernel.calls import HTTP
from tabane.testing.reach import reachable

CAPABILITIES = {
    name: number
    for number, name in enumerate(
        (
            *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID"),
            *("SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST"),
            *("NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO"),
            *("SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
            *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE"),
            *("AUDIT_CONTROL", "SETFCAP"),
        )
    )
}
"""From capability.h."""


def mask_of(*names: str) -> int:
    return sum(1 << CAPABILITIES[name.removeprefix("CAP_")] for name in names)


INSIDE = mask_of(*DEFAULT_CAPABILITIES)
GVISORS = INSIDE | mask_of("DAC_READ_SEARCH", "SYS_CHROOT", "SYS_PTRACE")
"""Of its own user namespace."""
MOST_CAPABILITIES = {
    "crun": INSIDE,
    "runc": INSIDE,
    "containerd": INSIDE,
    "runsc": GVISORS,
    "wasmtime": 0,
    "qemu-microvm": 0,
    "qemu": 0,
}
KERNELS = frozenset({"kexec_load", "mount", "pivot_root", "reboot", "swapon", "umount2"})
RARE = KERNELS | {"add_key", "bpf", "finit_module", "init_module", "keyctl", "perf_event_open"}
NEVER_IN_CONTAINERS = RARE | {"io_uring_setup", "open_by_handle_at", "setns", "userfaultfd"}
NEVER_IN_QEMU = NEVER_IN_CONTAINERS | {"execve", "fork", "setuid", "setresuid", "vfork"}
NEVER = {
    "crun": NEVER_IN_CONTAINERS,
    "runc": NEVER_IN_CONTAINERS,
    "containerd": NEVER_IN_CONTAINERS,
    "runsc": NEVER_IN_CONTAINERS | {"execve", "setuid", "unshare"},
    "wasmtime": NEVER_IN_CONTAINERS | {"execve", "openat", "socket", "mmap"},
    "qemu-microvm": NEVER_IN_QEMU,
    "qemu": NEVER_IN_QEMU,
}
"""System calls that no process of the instance can make."""
MOST_MEMORY = {
    "runsc": int(formats.outer_limits(LIMITS)["memory_bytes"]),
    "wasmtime": LIMITS.memory_bytes,
    "qemu-microvm": memory_for(LIMITS.memory_bytes) + OVERHEAD_BYTES,
    "qemu": memory_for(LIMITS.memory_bytes) + OVERHEAD_BYTES,
}
MOST_PIDS = {
    "runsc": int(formats.outer_limits(LIMITS)["pids"]),
    "qemu-microvm": BASE_THREADS + 1,
    "qemu": BASE_THREADS + 1,
}
"""What is not named has the app's own."""
INSIDE_QEMU = "/vm/layer"
SHORT_S = 2
"""What is not answered for so long is out of reach."""
NODE_PORTS = (7070, 7071, 7072)
MOST_FILES = 5000
"""As in `inside.c`."""
MOST_WRITTEN = LIMITS.disk_bytes + OWN_BYTES + LIMITS.disk_bytes // 16
"""With what an ext4 of that size has too much."""
EAT_MIB = 100
FILL = """
for place; do
  rm -f $place/filling
  busybox dd if=/dev/zero of=$place/filling bs=16k 2>/dev/null && echo $place is endless
  busybox stat -c %s $place/filling 2>/dev/null || echo 0
done
for place; do busybox rm -f $place/filling; done
"""
LISTEN = """
busybox httpd -f -p 81 -h /srv &
until busybox wget -qO- http://127.0.0.1:81/ 2>/dev/null; do busybox usleep 50000; done
kill $!
"""
REACH = """
host=$1; shift
for url; do
  (busybox timeout 5 busybox wget -qO- --header "Host: $host" $url && echo reached $url) &
done
wait
"""
CHANGE = "echo changed >/srv/kept; rm /bin/wc; : >/srv/new; cat /srv/kept; ls /srv"


# From the node


def no_process_gains_privileges(subject: Subject) -> None:
    for pid, status in subject.statuses().items():
        assert status["NoNewPrivs"] == "1", (pid, status["Name"])


def no_process_has_other_capabilities(subject: Subject) -> None:
    most = MOST_CAPABILITIES[subject.name]
    for pid, status in subject.statuses().items():
        held = {kind: int(status[kind], 16) for kind in ("CapPrm", "CapEff", "CapBnd")}
        more = {kind: hex(mask & ~most) for kind, mask in held.items() if mask & ~most}
        assert not more, (pid, status["Name"])
        assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0, pid


def every_process_has_its_list_of_calls(subject: Subject) -> None:
    for pid, status in subject.statuses().items():
        assert status["Seccomp"] == "2", (pid, status["Name"])
        found = reachable(pid)
        assert not found & NEVER[subject.name], (pid, status["Name"], found & NEVER[subject.name])
        if subject.name == "wasmtime":
            assert found == set(HTTP)
        if status["Name"] == "_confine":
            assert found == {"exit_group", "read", "wait4", "write"}


def ids_are_the_apps(subject: Subject) -> None:
    maps = {
        Path(f"/proc/{pid}/{kind}_map").read_text()
        for pid in subject.pids()
        for kind in ("uid", "gid")
    }
    ((first, base, count),) = (map(int, text.split()) for text in maps)
    assert (first, count) == (0, IDS) and base >= FIRST_ID_BASE and base % IDS == 0
    mine = range(base, base + IDS)
    for pid, status in subject.statuses().items():
        found = f"{status['Uid']} {status['Gid']} {status['Groups']}".split()
        assert all(int(one) in mine for one in found), (pid, status["Name"], found)
        assert namespace(pid, "user") != namespace(subject.node, "user")


def it_listens_at_a_low_port(subject: Subject) -> None:
    assert subject.cluster.get(subject.name).status == 200


def no_file_can_be_written(subject: Subject) -> None:
    """By those that run what has no files of the node's, or a kernel of its own, but its layer."""
    if subject.can_exec and not subject.own_kernel:
        return
    for pid in subject.pids():
        mounted = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        assert mounted
        writable = [fields[4] for fields in mounted if "ro" not in fields[5].split(",")]
        assert writable == ([INSIDE_QEMU] if subject.own_kernel else []), pid


def its_files_on_the_node_are_bounded(subject: Subject) -> None:
    """Those that its processes have open, and can write; an ext4 has tables of its own."""
    found = {}
    for pid in subject.pids():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            if descriptor.is_file() and is_for_writing(pid, descriptor.name):
                of = descriptor.stat()
                found[of.st_dev, of.st_ino] = (
                    0 if "memfd:" in str(descriptor.readlink()) else of.st_size
                )
    assert sum(found.values()) <= LIMITS.disk_bytes * 5 // 4, found


def is_for_writing(pid: int, descriptor: str) -> bool:
    lines = Path(f"/proc/{pid}/fdinfo/{descriptor}").read_text().splitlines()
    return int(lines[1].split()[1], 8) & os.O_ACCMODE != os.O_RDONLY


def processes_are_bounded(subject: Subject) -> None:
    assert subject.cgroup.limits()["pids"] <= MOST_PIDS.get(subject.name, LIMITS.pids)


def memory_is_bounded(subject: Subject) -> None:
    layered = LIMITS.with_layer().memory_bytes
    assert subject.cgroup.limits()["memory_bytes"] <= MOST_MEMORY.get(subject.name, layered)


def processors_are_bounded(subject: Subject) -> None:
    assert subject.cgroup.limits()["cpu"] == LIMITS.cpu


def the_outside_is_out_of_reach(subject: Subject) -> None:
    assert subject.get(str(GATEWAY), 80)[0] == 0
    code, out = subject.get(str(OUTSIDE), PORT, SHORT_S)
    assert (code != 0, out) == (True, "")


def only_the_node_answers_for_names(subject: Subject) -> None:
    own = f"{subject.name}.tabane"
    code, out = subject.busybox("nslookup", own, str(GATEWAY))
    assert code == 0 and str(GATEWAY) in out
    code, out = subject.busybox("nslookup", own, str(OUTSIDE), timeout_s=SHORT_S)
    assert code != 0, out


def the_node_is_out_of_reach(subject: Subject) -> None:
    """Its ports, on every address of its; and its sockets, none of which is shown."""
    addresses = (str(GATEWAY), *subject.cluster.addresses.values())
    urls = [f"http://{address}:{port}/" for address in addresses for port in NODE_PORTS]
    sure = f"http://{GATEWAY}/"
    _, out = subject.busybox("sh", "-c", REACH, "sh", f"{subject.name}.test", *urls, sure)
    assert [line for line in out.splitlines() if "reached" in line] == [f"reached {sure}"], repr(
        out
    )
    for pid in subject.pids():
        assert namespace(pid, "net") != namespace(subject.node, "net"), pid
        assert sockets_below(pid) == [], pid


def what_runs_it_is_confined(subject: Subject) -> None:
    """All in its cgroup has file systems of its own, without the node's, and nothing else of the
    engine goes on for it."""
    for pid in subject.pids():
        for kind in ("user", "mnt", "net", "ipc", "uts"):
            assert namespace(pid, kind) != namespace(subject.node, kind), (pid, kind)
        root = Path(f"/proc/{pid}/root")
        assert not root.samefile(f"/proc/{subject.node}/root"), pid
        for path in (subject.cluster.root, Path("/etc/shadow"), Path("/root"), Path("/run")):
            assert not (root / path.relative_to("/")).exists(), (pid, path)
        if subject.name in OWN_PIDS and read_status(pid)["Name"] != "_confine":
            assert namespace(pid, "pid") != namespace(subject.node, "pid"), pid
    others = wait_for(lambda: [None] if not engines_outside(subject) else None, "the engine's end")
    assert others == [None]


OWN_PIDS = ("crun", "runc", "wasmtime", "qemu-microvm", "qemu")


def engines_outside(subject: Subject) -> list[int]:
    """Processes named after the instance that are not in its cgroup."""
    mine, found = set(subject.pids()), []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(path.parent.name)
        try:
            words = path.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if subject.instance["id"].encode() in words and pid not in mine:
            found.append(pid)
    return found


# From inside


def a_set_user_id_program_gains_nothing(subject: Subject) -> None:
    assert subject.inside("stat", "-c", "%a %u", "/bin/gaining") == (0, "4755 0\n")
    assert subject.inside("/bin/gaining", "euid", user="web") == (0, "33\n")


def root_inside_has_ten_capabilities(subject: Subject) -> None:
    _, text = subject.inside("cat", "/proc/self/status")
    fields = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == INSIDE
    for argv in (
        ("busybox", "mknod", "/tmp/disk", "b", "8", "0"),
        ("busybox", "chroot", "/srv", "/bin/true"),
        ("busybox", "mount", "-t", "tmpfs", "none", "/tmp"),
        ("busybox", "ip", "address", "add", "10.0.0.1/32", "dev", "lo"),
    ):
        assert subject.inside(*argv)[0] != 0, argv


def its_users_are_the_images(subject: Subject) -> None:
    assert subject.inside("id", "-u") == (0, "0\n")
    assert subject.inside("id", "-u", user="web") == (0, "33\n")


def anyone_inside_listens_at_a_low_port(subject: Subject) -> None:
    assert subject.inside("busybox", "timeout", "30", "sh", "-c", LISTEN, user="web") == (0, PAGE)


def changes_stay_in_the_layer(subject: Subject) -> None:
    before = subject.images()
    assert any(path.endswith("/srv/kept") for path in before)
    code, out = subject.inside("sh", "-c", CHANGE)
    assert code == 0 and out.split() == ["changed", "index.html", "kept", "new"]
    assert subject.images() == before


def the_layer_fills_up(subject: Subject) -> None:
    """All places together, and by number; then there is room again."""
    places = ["/", "/tmp"] if subject.name == "runsc" else ["/", "/tmp", "/dev/shm"]
    places += [] if subject.own_kernel or subject.name == "runsc" else ["/dev"]
    _, out = subject.inside("sh", "-c", FILL, "sh", *places)
    sizes = [int(line) for line in out.split("\n")[:-1]]
    assert len(sizes) == len(places), out
    assert LIMITS.disk_bytes // 4 <= sum(sizes) <= MOST_WRITTEN
    _, out = subject.inside("inside", "files", "/tmp")
    assert 0 < int(out) < MOST_FILES
    assert subject.inside("sh", "-c", "echo room >/tmp/again && cat /tmp/again") == (0, "room\n")


def the_sandboxs_memory_files_are_bounded(subject: Subject) -> None:
    if subject.name != "runsc":
        return
    _, out = subject.inside("sh", "-c", FILL, "sh", "/dev/shm")
    assert 0 < int(out) <= LIMITS.disk_bytes


def it_starts_no_more_processes(subject: Subject) -> None:
    code, out = subject.inside("inside", "forks")
    assert code == 0 and 0 < int(out) < LIMITS.pids


def it_gets_no_more_memory(subject: Subject) -> None:
    """The one who takes too much ends, the instance goes on; a sandbox would end as a whole."""
    if subject.name == "runsc":
        return
    assert subject.inside("inside", "eat", str(EAT_MIB))[0] != 0
    assert subject.cluster.get(subject.name).body == PAGE
    (instance,) = subject.cluster.instances(subject.name)
    assert instance["id"] == subject.instance["id"]


def it_is_told_of_the_nodes_resolver_only(subject: Subject) -> None:
    assert subject.inside("cat", "/etc/resolv.conf") == (0, f"nameserver {GATEWAY}\n")
    assert subject.busybox("nslookup", f"{subject.name}.tabane")[0] == 0


Check = Callable[[Subject], None]
OUTER: dict[str, tuple[Check, ...]] = {
    "no_new_privileges": (no_process_gains_privileges,),
    "capabilities": (no_process_has_other_capabilities,),
    "seccomp": (every_process_has_its_list_of_calls,),
    "user_namespace": (ids_are_the_apps,),
    "low_ports": (it_listens_at_a_low_port,),
    "read_only_image": (no_file_can_be_written,),
    "disk_quota": (its_files_on_the_node_are_bounded,),
    "pids": (processes_are_bounded,),
    "memory": (memory_is_bounded,),
    "cpu": (processors_are_bounded,),
    "egress": (the_outside_is_out_of_reach,),
    "dns": (only_the_node_answers_for_names,),
    "node_services": (the_node_is_out_of_reach,),
    "engine": (what_runs_it_is_confined,),
}
INNER: dict[str, tuple[Check, ...]] = {
    "no_new_privileges": (a_set_user_id_program_gains_nothing,),
    "capabilities": (root_inside_has_ten_capabilities,),
    "user_namespace": (its_users_are_the_images,),
    "low_ports": (anyone_inside_listens_at_a_low_port,),
    "read_only_image": (changes_stay_in_the_layer,),
    "disk_quota": (the_layer_fills_up, the_sandboxs_memory_files_are_bounded),
    "pids": (it_starts_no_more_processes,),
    "memory": (it_gets_no_more_memory,),
    "dns": (it_is_told_of_the_nodes_resolver_only,),
}


def checks_of(default: str, *, can_exec: bool) -> tuple[Check, ...]:
    return OUTER.get(default, ()) + (INNER.get(default, ()) if can_exec else ())
