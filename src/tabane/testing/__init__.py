"""For tests of Tabane and of what is built on it: virtual time, fakes, conformance suites."""

from tabane.testing.clock import VirtualClock
from tabane.testing.stores import DURABLE_CHECKS, STORE_CHECKS, StoreBench, check_store

__all__ = ["DURABLE_CHECKS", "STORE_CHECKS", "StoreBench", "VirtualClock", "check_store"]
