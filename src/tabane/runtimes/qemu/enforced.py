"""How a machine enforces each default, or why it does not apply."""

from __future__ import annotations

from tabane.runtimes.api import Enforcement

ENFORCEMENTS = tuple(
    Enforcement(default, enforced, how)
    for default, enforced, how in (
        ("no_new_privileges", True, "set on QEMU, and by the guest's agent on all it starts"),
        (
            "capabilities",
            True,
            "QEMU has none; inside, the bounding set of containers and what the app declares, "
            "which counts in the guest only",
        ),
        (
            "seccomp",
            True,
            "of QEMU: containers' allow list, and beside it QEMU's own deny list (-sandbox), so it "
            "starts no program and becomes no other user. None inside: the kernel there is the "
            "instance's own",
        ),
        (
            "user_namespace",
            True,
            "QEMU is an ordinary user of the app's id range, in the link's user namespace, with "
            "mount, pid, ipc and uts namespaces of its own. None inside: ids there are the "
            "guest's, where each container has pid, mount, ipc and cgroup namespaces",
        ),
        ("low_ports", True, "net.ipv4.ip_unprivileged_port_start=0 in the guest"),
        ("read_only_image", True, "its disk is opened read-only; overlay's lower layer inside"),
        (
            "disk_quota",
            True,
            "the size of the second disk, which holds the upper layer and /dev/shm, and of volumes",
        ),
        ("pids", True, "pids.max inside; outside, that of QEMU's cgroup, for its threads"),
        (
            "memory",
            True,
            "memory.max inside; outside, the machine's memory and 96 MiB for QEMU in its cgroup",
        ),
        ("cpu", True, "CFS quota over 100 ms of QEMU's cgroup; as many processors as begun ones"),
        ("egress", True, "by the node's firewall on the link, whose end the machine takes over"),
        (
            "dns",
            True,
            "/etc/resolv.conf names the node's resolver only; others are outside (egress)",
        ),
        (
            "node_services",
            True,
            "by the node's firewall on the link; of the node's sockets it reaches those made for "
            "it alone that its app asks for, by way of the node's agent, which knows their names",
        ),
        (
            "engine",
            True,
            "QEMU, and what waits beside it for its end (which may make 4 system calls), see the "
            "machine's files, and of the node's its libraries; they can write the layer only, and "
            "volumes. What copies a sidecar's output into its log may make 6, as the same user",
        ),
    )
)
