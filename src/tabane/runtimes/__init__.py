"""What runs instances: the `Driver` interface, and the table of the drivers there are."""

from tabane.runtimes.api import (
    Capabilities,
    Command,
    Driver,
    Enforcement,
    ExecResult,
    Finished,
    Handle,
    Image,
    InstanceSpec,
    Link,
    Probe,
    Spawner,
    Stats,
)
from tabane.runtimes.registry import DRIVERS, load, probe_all

__all__ = [
    "DRIVERS",
    "Capabilities",
    "Command",
    "Driver",
    "Enforcement",
    "ExecResult",
    "Finished",
    "Handle",
    "Image",
    "InstanceSpec",
    "Link",
    "Probe",
    "Spawner",
    "Stats",
    "load",
    "probe_all",
]
