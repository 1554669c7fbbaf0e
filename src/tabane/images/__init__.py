"""Images: packed where an app is deployed, verified and unpacked where it runs."""

from tabane.images.packing import Packed, pack
from tabane.images.store import ImageStore

__all__ = ["ImageStore", "Packed", "pack"]
