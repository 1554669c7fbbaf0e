"""`tabane up`, `down`, `node`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tabane.clock import SYSTEM
from tabane.errors import TabaneError, TimedOut, UsageError
from tabane.tools.cli import interrupt
from tabane.tools.cli.common import Parser, complain, say
from tabane.tools.client import Cluster, default_root

if TYPE_CHECKING:
    from tabane.node.cluster import Shape

DATACENTERS = "tokyo,osaka,ishikari"
START_TIMEOUT_S = 60.0
SMALLEST_QUOTA = 16 << 20
POLL_S = 0.05


def up(argv: list[str]) -> int:
    parser = Parser("up", "Start a local cluster, each node in namespaces of its own.")
    parser.add_argument("-d", "--detach", action="store_true", help="return when it is up")
    parser.add_argument("--datacenters", metavar="NAME,NAME,...", help=f"default: {DATACENTERS}")
    parser.add_argument("--nodes", type=int, help="in each data center (default: 1)")
    parser.add_argument("--gateways", type=int, help="processes on each node (default: 1)")
    parser.add_argument("--driver", help="preferred driver of class container")
    parser.add_argument(
        "--allow-emulation",
        action=argparse.BooleanOptionalAction,
        help="run machines where processors can only be emulated, whatever their apps say",
    )
    parser.add_argument(
        "--image-quota",
        type=_quota,
        metavar="SIZE",
        help="what images may take on each node, as 20GiB (default: half of its disk)",
    )
    parser.add_argument(
        "--checkpoint-quota",
        type=_quota,
        metavar="SIZE",
        help="what checkpoints may take on each node (default: a fifth of its disk)",
    )
    parser.add_argument(
        "--checkpoint-memory",
        type=_quota,
        metavar="SIZE",
        help="what opened ones may take of its memory (default: a tenth)",
    )
    parser.add_argument(
        "--memory",
        type=_quota,
        metavar="SIZE",
        help="what the instances of each node may use of the machine's (default: all of it)",
    )
    parser.epilog = "A cluster that was stopped starts as it was, where nothing else is said."
    args = parser.parse_args(argv)
    from tabane.node.cluster import check_owner, former_shape

    root = args.root or default_root()
    check_owner(root)
    before = former_shape(root.resolve())
    shape = _shape_of(args, before)
    signal.signal(signal.SIGTERM, interrupt)
    if shape == before and _runs(root):
        return 0
    if args.detach:
        start_cluster(root, *shape)
        _say_left_out(before, shape)
        return 0
    with running_cluster(root, *shape):
        _say_left_out(before, shape)
        print("the cluster runs until Ctrl-C", flush=True)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    return 0


def _shape_of(args: argparse.Namespace, before: Shape | None) -> Shape:
    """As asked for; what was not said as it was before."""
    from tabane.node.cluster import Shape

    before = before or Shape(DATACENTERS.split(","), 1, 1, "")
    said = {
        "datacenters": None if args.datacenters is None else args.datacenters.split(","),
        "nodes": args.nodes,
        "gateways": args.gateways,
        "driver": args.driver,
        "allow_emulation": args.allow_emulation,
        "image_quota_bytes": args.image_quota,
        "checkpoint_quota_bytes": args.checkpoint_quota,
        "checkpoint_memory_bytes": args.checkpoint_memory,
        "memory_bytes": args.memory,
    }
    return before._replace(**{name: value for name, value in said.items() if value is not None})


def _quota(text: str) -> int:
    from tabane.units import parse_size

    try:
        size = parse_size(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    if 0 < size < SMALLEST_QUOTA:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 16MiB (0B: the default)")
    return size


def _runs(root: Path) -> bool:
    """Whether the cluster there runs, in which case all of it does: dead nodes are started again.
    Says where the gateways are."""
    from tabane.node import cluster as local
    from tabane.node.local import missing

    nodes = local.processes(root.resolve())
    if missing() or not any(process.runs for _, process in nodes):
        return False
    restarted = local.restart_dead(root.resolve())
    if restarted:
        wait_until_up(Cluster(root))
    for peer, _ in nodes:
        again = "started again: " if peer in restarted else ""
        say(f"{peer.key:<24} {again}gateway http://{peer.address}:80")
    if not restarted:
        say(f"the cluster below {root} runs already")
    return True


def _say_left_out(before: Shape | None, shape: Shape) -> None:
    if before is None:
        return
    nodes = [
        f"{dc}/{dc}-{number}"
        for dc in before.datacenters
        for number in range(1, before.nodes + 1)
        if dc not in shape.datacenters or number > shape.nodes
    ]
    if nodes:
        wanted = f"--datacenters {','.join(before.datacenters)} --nodes {before.nodes}"
        complain(
            f"up: without {', '.join(nodes)}, which the cluster had before: what is stored there "
            f"stays, and `tabane down` and `tabane up {wanted}` start all of it again"
        )


@contextmanager
def running_cluster(
    root: Path,
    datacenters: list[str],
    nodes: int,
    gateways: int = 1,
    driver: str = "",
    allow_emulation: bool = False,
    image_quota_bytes: int = 0,
    checkpoint_quota_bytes: int = 0,
    checkpoint_memory_bytes: int = 0,
    memory_bytes: int = 0,
) -> Iterator[None]:
    """A cluster that ends with the block, however that ends."""
    from tabane.node.cluster import check_free

    check_free(root.resolve())
    try:
        checkpoints = checkpoint_quota_bytes, checkpoint_memory_bytes
        quotas = image_quota_bytes, *checkpoints, memory_bytes
        start_cluster(root, datacenters, nodes, gateways, driver, allow_emulation, *quotas)
        yield
    finally:
        if (root / "cluster.json").exists():
            stop_cluster(root)


def start_cluster(
    root: Path,
    datacenters: list[str],
    nodes: int,
    gateways: int,
    driver: str,
    allow_emulation: bool = False,
    image_quota_bytes: int = 0,
    checkpoint_quota_bytes: int = 0,
    checkpoint_memory_bytes: int = 0,
    memory_bytes: int = 0,
) -> None:
    """Start it, wait until every node answers, and say where the gateways are."""
    from tabane.node import cluster as local
    from tabane.node.local import missing

    if gateways < 1:
        raise UsageError("gateways: want 1 or more")
    local.check_names(datacenters, nodes)
    local.check_driver(driver)
    if lacks := missing():
        raise TabaneError("a local cluster cannot run here: " + "; ".join(lacks))
    config = local.bring_up(
        root.resolve(),
        datacenters,
        nodes,
        gateways=gateways,
        driver=driver,
        allow_emulation=allow_emulation,
        image_quota_bytes=image_quota_bytes,
        checkpoint_quota_bytes=checkpoint_quota_bytes,
        checkpoint_memory_bytes=checkpoint_memory_bytes,
        memory_bytes=memory_bytes,
    )
    try:
        wait_until_up(Cluster(root))
        for peer in config.nodes:
            print(f"{peer.key:<24} gateway http://{peer.address}:80", flush=True)
    except BaseException:
        _say_stopping(root)
        local.bring_down(root.resolve(), timeout_s=local.START_BROKEN_OFF_S)
        raise


def _say_stopping(root: Path) -> None:
    """So that nobody wonders; without a reader it ends all the same."""
    with suppress(OSError):
        print(f"stopping the cluster below {root} ...", flush=True)


def wait_until_up(cluster: Cluster) -> None:
    """Every node answers, sees all others, and its gateways know the routes."""
    deadline = SYSTEM.now() + START_TIMEOUT_S
    waiting = list(cluster.nodes)
    problem: TabaneError | None = None
    while waiting:
        if SYSTEM.now() > deadline:
            logs = cluster.root / "nodes" / waiting[0] / "log" / "node.log"
            raise TimedOut(f"{', '.join(waiting)} did not come up: {problem}; see {logs}")
        try:
            if cluster.get("/api/v1/node", node=waiting[0])["whole"]:
                waiting.pop(0)
                continue
        except TabaneError as error:
            problem = error
        signal.sigtimedwait([], POLL_S)


def down(argv: list[str]) -> int:
    parser = Parser(
        "down", "Stop the local cluster and leave nothing behind; what is stored stays."
    )
    parser.add_argument("--purge", action="store_true", help="remove what is stored, too")
    args = parser.parse_args(argv)
    from tabane.node import cluster as local

    root = args.root or default_root()
    Cluster(root)
    local.check_owner(root)
    stop_cluster(root)
    if args.purge:
        local.forget(root.resolve())
    return 0


def stop_cluster(root: Path) -> None:
    """Instances get their stop signal first; then the nodes end."""
    from tabane.node import cluster as local

    cluster = Cluster(root)
    running = [peer.key for peer, process in local.processes(root.resolve()) if process.runs]
    if running:
        _say_stopping(root)
    for node in running:
        try:
            cluster.get("/api/v1/node", node=node)  # one that hangs is found out sooner by this
            cluster.post("/api/v1/node/stop-instances", node=node)
        except TabaneError as error:
            print(f"tabane: {node}: {error.message}; it is ended all the same", file=sys.stderr)
    local.bring_down(root.resolve())


def node(argv: list[str]) -> int:
    parser = Parser("node", "Run one node in the foreground, as the first process of its machine.")
    parser.add_argument("config", type=Path, help="the node's holder.json")
    args = parser.parse_args(argv)
    if not args.config.is_file():
        raise UsageError(f"node: there is no file {args.config}")
    os.execv(sys.executable, [sys.executable, "-m", "tabane.node.holder", str(args.config)])
