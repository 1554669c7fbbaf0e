"""How an app's home finds a node for an instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tabane.model import App, NodeName
from tabane.scheduler.placement import Choice

Place = Callable[[App, Mapping[NodeName, str]], Choice]
"""Picks the node for one more instance, but none of those, which declined it for a reason."""
