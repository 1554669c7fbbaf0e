"""For tests of Tabane and of what is built on it: virtual time, fakes, conformance suites."""

from tabane.testing.checkpoints import CHECKPOINT_CHECKS, check_driver
from tabane.testing.clock import VirtualClock
from tabane.testing.drivers import DRIVER_CHECKS, Behaviour, DriverBench
from tabane.testing.spawner import PlainSpawner
from tabane.testing.stores import DURABLE_CHECKS, STORE_CHECKS, StoreBench, check_store

__all__ = [
    "CHECKPOINT_CHECKS",
    "DRIVER_CHECKS",
    "DURABLE_CHECKS",
    "STORE_CHECKS",
    "Behaviour",
    "DriverBench",
    "PlainSpawner",
    "StoreBench",
    "VirtualClock",
    "check_driver",
    "check_store",
]
