"""How often a revision's checkpoints failed on a node, and what follows: plain functions of time.

A dump that fails is tried again after pauses that double, unless it never can be. A restore that
fails costs its wake some time, so the next ones begin cold for a while. Many that began before the
first of them failed count once. A checkpoint of which restores fail again and again is of no use:
it is to be discarded, and another may be made; that this is worth less each time shows in the same
pauses, as they are forgotten only once a copy has become ready.
"""

from __future__ import annotations

from dataclasses import dataclass

NEVER = float("-inf")
DUMP_FIRST_S, DUMP_LAST_S = 2.0, 600.0
RESTORE_FIRST_S = 1.0
PUT_OFF_S = 5.0
RESTORES = 3
"""After so many failures in a row a checkpoint is given up."""


@dataclass(slots=True)
class Attempts:
    """Of one revision's instances with one driver."""

    dumps: int = 0
    """That failed in a row; a checkpoint that had to be discarded is one of them."""
    restores: int = 0
    dump_at: float = NEVER
    """No dump is begun before."""
    restore_at: float = NEVER
    failed_at: float = NEVER
    """When a restore last failed."""
    is_final: bool = False
    """An instance like these can never be saved."""
    reason: str = ""
    """Of the last failure; empty when all is well."""

    def on_dumped(self) -> None:
        """There is one, but nobody knows yet whether it can be restored."""
        self.dump_at, self.restore_at, self.reason = NEVER, NEVER, ""

    def on_dump_failed(self, reason: str, now: float, *, final: bool = False) -> None:
        self.dumps, self.reason, self.is_final = self.dumps + 1, reason, final
        self.dump_at = now + min(DUMP_FIRST_S * 2 ** min(self.dumps - 1, 20), DUMP_LAST_S)

    def on_restored(self) -> None:
        self.dumps, self.restores, self.reason = 0, 0, ""
        self.dump_at, self.restore_at = NEVER, NEVER

    def on_restore_failed(self, reason: str, began: float, now: float) -> bool:
        """Whether the checkpoint, of which a restore began then, is to be discarded."""
        self.reason = reason
        if began < self.failed_at:
            return False
        self.failed_at = now
        self.restores += 1
        self.restore_at = now + RESTORE_FIRST_S * 2 ** (self.restores - 1)
        if self.restores < RESTORES:
            return False
        self.restores = 0
        self.on_dump_failed(f"its checkpoint was discarded: {reason}", now)
        return True

    def put_off(self, reason: str, now: float) -> None:
        """A restore was not even tried, and nothing is wrong with the checkpoint."""
        self.reason, self.restore_at = reason, now + PUT_OFF_S

    def dump_in_s(self, now: float) -> float | None:
        """How long until one may be dumped; None: never."""
        return None if self.is_final else max(0.0, self.dump_at - now)

    def may_restore(self, now: float) -> bool:
        return now >= self.restore_at

    def describe(self) -> str:
        """The rest of a sentence that begins with the app's name; empty when all is well."""
        if not self.reason:
            return ""
        return f"starts without a checkpoint: {self.reason}"
