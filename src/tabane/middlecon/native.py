"""Whether a hub's inner loops run in C: the one place that decides.

`loops` is the module in C, or None: it is made at installation where there is a C compiler
(docs/decisions/native-loops.md). TABANE_MIDDLECON_PURE=1 leaves it out. Whoever has a loop there
has the same in Python.
"""

from __future__ import annotations

import os
from types import ModuleType

PURE = "TABANE_MIDDLECON_PURE"


def load() -> ModuleType | None:
    """The module in C, if it is there and wanted."""
    if os.environ.get(PURE) == "1":
        return None
    try:
        from tabane.middlecon import _native
    except ImportError:
        return None
    return _native


loops = load()
