"""What an app's home decides about instances that are put away: saved as they are (their own state,
not a copy's), and ended, until sessions want them. Plain functions of the app's books.

One is put away when no session used it for `checkpoint_after`, and nobody gets a slot of it before
its node has said that it ended, or goes on. When sessions need another instance it is that very one
which goes on, once, on the node that has it. A new one begins instead only where that one cannot
go on now, and its wake record says why. What is put away is gone as anything is that no session
used for `stop_after`, or by a new revision.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from tabane.gateway.instructions import Start, Stop, Thaw
from tabane.gateway.ledger import AppLedger, Away, Holding
from tabane.gateway.place import Place


def away_after_s(ledger: AppLedger, holding: Holding) -> float | None:
    """After how long without a session it is to be put away; None: never."""
    able = holding.can_put_away and holding.revision == ledger.revision
    return ledger.current.reactive.checkpoint_after_s if able else None


def bring_back(ledger: AppLedger, place: Place, now: float) -> Start | str | None:
    """Have one go on. None: one will in a moment, when its address is free; a sentence: why of
    those that there are none can, empty when there are none."""
    note, ledger.lost = ledger.lost, ""
    for away in ledger.away_ones():
        if now < away.not_before:
            note = note or f"{away.id}, which is put away, is left alone: {away.reason}"
            continue
        if away.id in ledger.instances:
            return None
        choice = place(replace(ledger.current, pinned_to=away.node), ledger.declines(now))
        if choice.node is not None:
            ledger.add_start(away.id, away.node, now)
            return Start(ledger.current, away.id, away.node, resume=True)
        note = note or f"{away.id} is put away on {away.node}, which cannot run it now"
    return note


def call_back(ledger: AppLedger) -> Iterator[Thaw]:
    """Sessions wait: what is being put away goes on, if it is not too late."""
    short = ledger.total_waiting()
    for holding in ledger.going():
        if (short > 0 or holding.granted) and not holding.is_called:
            holding.is_called = True
            yield Thaw(holding.id, holding.node)
        short -= ledger.current.reactive.concurrency


def drop_old(ledger: AppLedger, now: float) -> Iterator[Stop]:
    """What is put away is not kept for ever."""
    stop_after_s = ledger.current.reactive.stop_after_s
    for away in [*ledger.away.values()]:
        if away.revision < ledger.revision:
            yield drop(ledger, away, f"replaced by revision {ledger.revision}")
        elif now >= away.last_used + stop_after_s:
            yield drop(ledger, away, f"put away, and idle for {stop_after_s:g} s")


def drop(ledger: AppLedger, away: Away, reason: str) -> Stop:
    del ledger.away[away.id]
    return Stop(ledger.key, away.id, away.node, reason)
