"""k2i: which processes run, and which instance and app each belongs to."""

from tabane.k2i.api import build_router
from tabane.k2i.table import Process, ProcessTable
from tabane.k2i.v1 import Record

__all__ = ["Process", "ProcessTable", "Record", "build_router"]
