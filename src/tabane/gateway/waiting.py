"""Why sessions of an app still wait, in words: from its books at its home. A plain function."""

from __future__ import annotations

from tabane.gateway.ledger import AppLedger, Holding

REASONS_SAID = 3
"""Of why no node can run an app: those of the first nodes stand for all."""


def why_nowhere(ledger: AppLedger, reasons: tuple[str, ...]) -> str:
    """A sentence, of what each node said."""
    said = "; ".join((*reasons[:REASONS_SAID], *("...",)[: len(reasons) > REASONS_SAID]))
    return f"no node of this data center can run {ledger.key} now ({said})"


def why_waiting(ledger: AppLedger, now: float) -> str:
    """What is known of it, as the end of a sentence; never empty."""
    parts = []
    if serving := ledger.serving():
        parts.append(_describe_serving(ledger, serving, now))
    if starting := ledger.starting():
        parts.append(_describe_starting(starting, now))
    elif leaving := [*ledger.draining(), *ledger.stopping()]:
        parts.append(f"instance {leaving[0].id} on {leaving[0].node} is being stopped")
    if problem := ledger.setbacks.describe(now):
        parts.append(f"it {problem}")
    return "; ".join(parts) or "its nodes have not said yet what they run of it"


def _describe_serving(ledger: AppLedger, serving: list[Holding], now: float) -> str:
    if missed := [holding for holding in serving if not holding.takes_sessions(now)]:
        return f"instance {missed[0].id} on {missed[0].node} could not be reached"
    slots = sum(holding.app.reactive.concurrency for holding in serving if holding.app)
    count = len(serving)
    all_of = f"all {slots} slots of its {count} instances are" if count > 1 else _all_of_one(slots)
    return f"{all_of} in use (max = {ledger.current.reactive.max})"


def _all_of_one(slots: int) -> str:
    return f"all {slots} slots of its instance are" if slots > 1 else "its instance's one slot is"


def _describe_starting(starting: list[Holding], now: float) -> str:
    first = min(starting, key=lambda holding: holding.began)
    others = f", and {len(starting) - 1} more" if len(starting) > 1 else ""
    begun = f"instance {first.id} starts on {first.node} since {now - first.began:.0f} s{others}"
    return f"{begun}: {first.doing}" if first.doing else begun
