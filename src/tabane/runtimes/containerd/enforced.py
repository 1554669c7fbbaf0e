"""How containerd's containers enforce the defaults: as all containers do, but for the engine."""

from __future__ import annotations

from tabane.runtimes import bundle
from tabane.runtimes.api import Enforcement

ENGINE = Enforcement(
    "engine",
    False,
    "containerd and the shim beside each container are programs of the node's, which run as its "
    "root: they start what is confined, as the node itself does, and the program is shown nothing "
    "of them but its streams",
)
ENFORCEMENTS = tuple(ENGINE if row.default == "engine" else row for row in bundle.ENFORCEMENTS)
