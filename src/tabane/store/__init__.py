"""What must be strongly consistent: the `Store` interface and its implementations."""

from tabane.store.api import Change, Delete, Entry, Expect, Put, Store, Watch, Write
from tabane.store.feed import Changes, Feed, Snapshot, StoreFeed, Update
from tabane.store.memory import MemoryStore
from tabane.store.replica import Replica
from tabane.store.sqlite import SqliteStore

__all__ = [
    "Change",
    "Changes",
    "Delete",
    "Entry",
    "Expect",
    "Feed",
    "MemoryStore",
    "Put",
    "Replica",
    "Snapshot",
    "SqliteStore",
    "Store",
    "StoreFeed",
    "Update",
    "Watch",
    "Write",
]
