"""How the defaults are enforced for microVMs of Firecracker's."""

from __future__ import annotations

from tabane.runtimes.api import Enforcement

ENFORCEMENTS = tuple(
    Enforcement(default, enforced, how)
    for default, enforced, how in (
        ("no_new_privileges", True, "in the guest by its agent; of Firecracker by its own filter"),
        ("capabilities", True, "in the guest by its agent; Firecracker has none, it is not root"),
        (
            "seccomp",
            True,
            "of Firecracker: its own filters for each of its threads. In the guest none: what its "
            "program does to the guest's kernel ends there",
        ),
        (
            "user_namespace",
            False,
            "the guest's ids are its own. Firecracker runs as an id of its app's range, without a "
            "user namespace: the jailer makes none",
        ),
        ("low_ports", True, "net.ipv4.ip_unprivileged_port_start=0 in the guest"),
        ("read_only_image", True, "a read-only disk, mounted read-only into the jail"),
        ("disk_quota", True, "the size of the disk that holds what it writes"),
        ("pids", True, "pids.max of its program's cgroup in the guest"),
        ("memory", True, "of its program in the guest; of Firecracker with it by its cgroup"),
        ("cpu", True, "CFS quota of Firecracker's cgroup over 100 ms"),
        ("egress", True, "by the node's firewall on the link; the tap is behind the link"),
        ("dns", True, "/etc/resolv.conf names the node's resolver only; others are outside"),
        (
            "node_services",
            True,
            "by the node's firewall on the link; of the node's sockets it reaches those made for "
            "it alone that its app asks for, by way of the node's agent, which knows their names",
        ),
        (
            "engine",
            True,
            "the jailer's: a root with the machine's files and devices only, mount and pid "
            "namespaces of its own, an id of the app's",
        ),
    )
)
