"""Checkpoints on a node: what they need, where they are kept, and whether they can be restored."""

from tabane.images.checkpoint.manifest import About, Kept, Manifest, Stored
from tabane.images.checkpoint.preflight import Here, preflight
from tabane.images.checkpoint.store import CheckpointStore, Dump, Lease
from tabane.images.checkpoint.vault import WrongKey

__all__ = [
    "About",
    "CheckpointStore",
    "Dump",
    "Here",
    "Kept",
    "Lease",
    "Manifest",
    "Stored",
    "WrongKey",
    "preflight",
]
