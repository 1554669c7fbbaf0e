"""The logs of the containers beside the main one: of each a small process, which copies what the
machine says at two places to its own outputs, for the spawner to write down (see relay.c)."""

from __future__ import annotations

from pathlib import Path

from tabane.model import InstanceId
from tabane.runtimes.api import Command, InstanceSpec
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.pods import log_of

RELAY = Path(__file__).parents[1] / "_relay"
"""Compiled when Tabane is installed (hatch_build.py)."""

Places = tuple[Path, Path]
"""Where the machine says what goes to stdout and to stderr: pipes that are there, or sockets to
listen at."""


def key_of(instance: InstanceId, number: int) -> str:
    """In the spawner's books, of the sidecar with that number, counted from 1."""
    return f"log{number}-{instance}"


def make_command(spec: InstanceSpec, number: int, places: Places, owner: int) -> Command:
    """What writes the log of a sidecar until the machine ends, as the user `owner`."""
    groups = [f"{place}/cgroup.procs" for place in Cgroup(spec.cgroup).own_directories()]
    options = [word for group in groups for word in ("--cgroup", group)]
    argv = (str(RELAY), *options, "--id", str(owner), *map(str, places))
    name = spec.sidecars[number - 1].name
    return Command(key_of(spec.id, number), argv, log=log_of(spec.log, name))
