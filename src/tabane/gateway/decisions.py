"""What an app's home decides, from the app's books and the moment; without IO.

`Decisions.settle()` brings one app from how it is to how it should be, as far as that goes now,
and leaves in `out` what to do. It may be called at any time, and does nothing when all is well.
`activation` calls it after every event.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from tabane.gateway.instructions import (
    Freeze,
    Instruction,
    Release,
    Save,
    Start,
    Stop,
    Tell,
    Thaw,
)
from tabane.gateway.ledger import AppLedger, Holding, proven_at
from tabane.gateway.lowering import LOWER_IDLE_S
from tabane.gateway.messages import SAVED, THAW, Revoke, ToGateway
from tabane.gateway.place import Place
from tabane.gateway.putting_away import away_after_s, bring_back, call_back, drop, drop_old
from tabane.gateway.waiting import why_nowhere, why_waiting
from tabane.model import InstanceId, State
from tabane.scheduler.placement import Choice
from tabane.scheduler.pressure import Rung

RECALL_S = 0.1
"""How rarely gateways are asked for slots that others wait for, and how long a start waits for what
may make it needless: longer than a round trip in a data center."""
ASK_AGAIN_S = 0.1
"""How rarely gateways are asked whether an instance is idle, however short its `stop_after`."""
SAVE_IDLE_S = 0.2
"""Without a session for so long, an instance is saved: about as long as it stands still for that,
so that one whose sessions come one after the other is left alone until there is a gap."""
ELSEWHERE_RETRY_S = 1.0
LATE_RETRY_S = 1.0
SHORT_AGAIN_S = 5.0
"""What `min` keeps, and no node could take, is tried again: memory comes free without a word."""
VERDICT_S = 0.5
"""Sessions wait this much longer than `start_timeout`, so that a node's verdict on the start, which
says why, comes first; and less than after which gateways give up by themselves."""
STARTING_AT_ONCE = 256
"""So many instances of one app are being started at a time: more than the nodes of a data center
start in parallel, and few enough to decide in a moment. Each that is ready makes room for one."""
UNPROVEN_AT_ONCE = 8
"""The same of a revision of which none has been ready here: it may be one that never is."""
PATIENCE_S = 1.0
"""So long sessions wait for the end of a pause of an app that did not start twice or more often.
When it is longer they are better told at once, and when to come again."""

CROWDED_S, CROWDED_AGAIN_S = 2.0, 0.1
"""So long sessions wait for memory, as others end; and how often it is looked for, since it comes
free without a word."""


class Decisions:
    """One look at one app. `partial`: some gateway may hold slots that the books do not show."""

    def __init__(
        self,
        ledger: AppLedger,
        now: float,
        *,
        partial: bool,
        place: Place,
        new_id: Callable[[], InstanceId],
    ) -> None:
        self.out: list[Instruction] = []
        self._ledger = ledger
        self._now = now
        self._partial = partial
        self._place = place
        self._new_id = new_id

    def settle(self) -> None:
        if not self._partial:
            for holding in self._ledger.instances.values():
                holding.doubtful = False
        self._forget_ended()
        if self._ledger.app is None:
            if not self._ledger.is_early:
                self._wind_up()
        else:
            self._forgive()
            self._roll()
            self._retire()
            self._trim()
            self.out += drop_old(self._ledger, self._now)
            self._grant()
            self.out += call_back(self._ledger)
            self._recall()
            self._start()
            self._refuse_overdue()
            self._rest_idle()
        self._stop_drained()
        self._thaw_used()

    def drain(self, holding: Holding, reason: str) -> None:
        """Let its sessions end, then stop it."""
        if holding.is_leaving:
            return
        if holding.state is State.STARTING:
            self._stop(holding, reason)
            return
        holding.draining, holding.drain_until = reason, self._now + holding.drain_timeout_s
        self.revoke(holding)

    def revoke(self, holding: Holding) -> None:
        """Have its slots back, each when its session ends."""
        for gateway in holding.granted:
            self._tell(gateway, Revoke(self._ledger.key, holding.id, None))

    def refuse(self, kind: str, reason: str, retry_after_s: float, waited_s: float = 0.0) -> None:
        """Tell all who wait, for at least `waited_s`, that they get no slot."""
        ledger = self._ledger
        for gateway in ledger.late_gateways(self._now - waited_s):
            self._tell(gateway, ledger.refuse(gateway, kind, reason, retry_after_s, waited_s))

    def refuse_failed(self) -> None:
        """A start failed: tell those who waited for it, unless it was the first to fail and may go
        well next time, or they may get a slot of what runs."""
        setbacks = self._ledger.setbacks
        if (setbacks.count > 1 or setbacks.is_final) and not self._serves():
            self.refuse("broken", setbacks.describe(self._now), setbacks.left_s(self._now))

    def _refuse_late(self) -> None:
        """Nothing is started before the pause is over: tell those who cannot wait for that."""
        ledger, setbacks, now = self._ledger, self._ledger.setbacks, self._now
        if self._serves():
            return
        left_s, reason = setbacks.left_s(now), setbacks.describe(now)
        waited_s = max(0.0, ledger.current.reactive.start_timeout_s - left_s)
        if setbacks.is_final or (setbacks.failed_starts > 1 and left_s > PATIENCE_S):
            waited_s = 0.0
        for gateway in ledger.waiting_gateways():
            since = ledger.accounts[gateway].since
            if since <= now - waited_s:
                kind = "broken" if since < setbacks.at else "paused"
                self._tell(gateway, ledger.refuse(gateway, kind, reason, left_s, waited_s))

    def _refuse_overdue(self) -> None:
        """Tell those who have waited too long what is known of what they wait for."""
        ledger, now = self._ledger, self._now
        waited_s = ledger.current.reactive.start_timeout_s + VERDICT_S
        if ledger.late_gateways(now - waited_s):
            self.refuse("late", why_waiting(ledger, now), LATE_RETRY_S, waited_s)

    def _serves(self) -> bool:
        return any(holding.app is not None for holding in self._ledger.standing())

    def moments(self) -> Iterable[float]:
        """When something is to be decided without anything happening; some may be past."""
        ledger = self._ledger
        yield from (holding.drain_until for holding in ledger.draining())
        if ledger.app is None:
            return
        reactive = ledger.app.reactive
        yield from (away.last_used + reactive.stop_after_s for away in ledger.away.values())
        yield ledger.setbacks.blocked_until
        yield from (until for until, _ in ledger.declined.values())
        for gateway in ledger.waiting_gateways():
            yield ledger.recalled_at + RECALL_S
            yield ledger.accounts[gateway].since + reactive.start_timeout_s + VERDICT_S
        if ledger.short_since is not None:
            yield ledger.short_since + RECALL_S
            yield self._now + (CROWDED_AGAIN_S if ledger.crowded else SHORT_AGAIN_S)
        for holding in ledger.standing():
            yield holding.suspect_until
            if ledger.setbacks.count:
                yield proven_at(holding)
            if reactive.max_age_s is not None:
                yield holding.born + reactive.max_age_s
        for holding in (*ledger.standing(), *ledger.unconfirmed()):
            if holding.lowering is not None:
                yield holding.lowering.until
                yield max(holding.last_used + LOWER_IDLE_S, holding.asked_at + ASK_AGAIN_S)
            for after_s in (reactive.stop_after_s, self._freeze_after_s(holding)):
                if after_s is not None:
                    yield max(holding.last_used + after_s, holding.asked_at + ASK_AGAIN_S)
            if (after_s := away_after_s(ledger, holding)) is not None:
                idle_at = holding.last_used + after_s
                yield max(idle_at, holding.away_at, holding.asked_at + ASK_AGAIN_S)
            if self._may_save(holding):
                idle_at = holding.last_used + self._save_after_s()
                yield max(idle_at, holding.save_at, holding.asked_at + ASK_AGAIN_S)

    def _tell(self, gateway: str, message: ToGateway) -> None:
        self.out.append(Tell(gateway, message))

    def _forget_ended(self) -> None:
        """What ended, and what only a gateway believed in, goes when nobody holds slots of it."""
        ledger = self._ledger
        for holding in list(ledger.instances.values()):
            if holding.granted:
                continue
            if holding.state is State.UNKNOWN:
                del ledger.instances[holding.id]
            elif holding.state is State.ABSENT and not self._partial:
                del ledger.instances[holding.id]
                self.out.append(Release(ledger.key, holding.id, holding.node))

    def _wind_up(self) -> None:
        """The app was removed."""
        self.refuse("gone", f"the app {self._ledger.key} was removed", 0.0)
        for holding in self._ledger.instances.values():
            self.drain(holding, "the app was removed")
        for away in [*self._ledger.away.values()]:
            self.out.append(drop(self._ledger, away, "the app was removed"))

    def _forgive(self) -> None:
        ledger = self._ledger
        if ledger.setbacks.count and any(
            holding.revision == ledger.revision
            and holding.born > ledger.setbacks.at
            and self._now >= proven_at(holding)
            for holding in ledger.standing()
        ):
            ledger.setbacks.forgive()

    def _roll(self) -> None:
        """Drain what is of an old revision, once an instance of the new one is ready; or before,
        when that needs the volumes of the old one."""
        ledger = self._ledger
        if ledger.serves_current() or ledger.current.volumes:
            for holding in (*ledger.standing(), *ledger.starting()):
                if holding.revision != ledger.revision:
                    self.drain(holding, f"replaced by revision {ledger.revision}")

    def _retire(self) -> None:
        """Drain what is too old, or where the app may not run any more."""
        app = self._ledger.current
        age_s = app.reactive.max_age_s
        for holding in self._ledger.standing():
            datacenter = holding.node.partition("/")[0]
            if not app.allows(datacenter):
                self.drain(holding, f"it may not run in {datacenter} any more")
            elif age_s is not None and self._now >= holding.born + age_s:
                self.drain(holding, f"older than its max_age of {age_s:g} s")

    def _trim(self) -> None:
        """Drain what is above `max`: it was lowered, or two nodes were home at once."""
        if self._partial:
            return
        ledger = self._ledger
        limit = ledger.current.reactive.max
        standing, starting = ledger.standing(), ledger.starting()
        standing.sort(key=lambda h: (h.revision == ledger.revision, h.state is State.READY, h.used))
        surplus = standing[: max(0, len(standing) - limit)]
        room = max(0, limit + ledger.rolls() - (len(standing) - len(surplus)))
        starting.sort(key=lambda h: h.revision != ledger.revision)
        for holding in (*surplus, *starting[room:]):
            self.drain(holding, f"more than its max of {limit}")

    def _grant(self) -> None:
        """Give free slots to who waits longest: at last those of instances that broke off an
        answer, and of frozen ones, which are thawed for it."""
        ledger, now = self._ledger, self._now
        serving = sorted(ledger.serving(), key=lambda holding: now < holding.suspect_until)
        serving += ledger.frozen()
        if not ledger.current.takes_sessions:
            self.refuse("gone", f"the app {ledger.key} has no port, it takes no sessions", 0.0)
        for gateway in ledger.waiting_gateways():
            for holding in serving:
                slots = min(ledger.waiting(gateway), holding.free(now))
                if slots > 0:
                    self._thaw(holding)
                    self._tell(gateway, ledger.grant(gateway, holding, slots, now))
        for holding in serving:
            holding.trace = None

    def _recall(self) -> None:
        """Ask the others for slots that who waits longest could use: those that are free; from
        gateways whose own sessions wait too, but not as long, the next that come free."""
        ledger = self._ledger
        waiting = ledger.waiting_gateways()
        if not waiting or self._now < ledger.recalled_at + RECALL_S:
            return
        wanted = ledger.waiting(waiting[0])
        for holding in ledger.serving():
            if not holding.takes_sessions(self._now):
                continue
            for gateway in holding.granted:
                if gateway == waiting[0] or gateway in holding.owing:
                    continue
                if gateway in waiting:
                    if not wanted:
                        continue
                    wanted -= 1
                holding.owing.add(gateway)
                self._ask(gateway, holding, 0.0)
                ledger.recalled_at = self._now

    def _ask(self, gateway: str, holding: Holding, unused_s: float) -> None:
        holding.asked.add(gateway)
        self._tell(gateway, Revoke(self._ledger.key, holding.id, unused_s))

    def _start(self) -> None:
        ledger = self._ledger
        missing, ledger.crowded = self._missing(), False
        if missing <= 0:
            ledger.short_since = None
            return
        if ledger.short_since is None:
            ledger.short_since = self._now
        if self._now < ledger.setbacks.blocked_until:
            self._refuse_late()
            return
        if self._may_find_slots(ledger.short_since):
            return
        declines = ledger.declines(self._now)
        for _ in range(min(missing, self._most_at_once() - len(ledger.starting()))):
            note = bring_back(ledger, self._place, self._now)
            if not isinstance(note, str):
                self.out += [note] if note is not None else []
                continue
            choice = self._place(ledger.current, declines)
            if choice.node is None:
                self._refuse_elsewhere(choice)
                return
            instance = self._new_id()
            ledger.add_start(instance, choice.node, self._now, note)
            self.out.append(Start(ledger.current, instance, choice.node))

    def _most_at_once(self) -> int:
        is_proven = self._ledger.proven >= self._ledger.revision
        return STARTING_AT_ONCE if is_proven else UNPROVEN_AT_ONCE

    def _missing(self) -> int:
        """How many instances to start now."""
        ledger = self._ledger
        reactive = ledger.current.reactive
        if ledger.current.volumes and ledger.has_any():
            return 0
        starting, standing = ledger.starting(), ledger.standing()
        trial = not ledger.serves_current()
        if trial and (starting or standing):
            if not ledger.starts_current():
                return 1 if len(starting) + len(standing) <= reactive.max else 0
            if standing or ledger.setbacks.count:
                return 0
        going = len(ledger.going())
        existing = len(starting) + len(standing) + len(ledger.unconfirmed()) + going
        short = ledger.total_waiting() - (len(starting) + going) * reactive.concurrency
        for_sessions = -(-short // reactive.concurrency)
        missing = min(max(for_sessions, ledger.floor - existing), reactive.max - existing)
        return min(missing, 1) if trial and ledger.setbacks.count else missing

    def _may_find_slots(self, since: float) -> bool:
        """What gateways and nodes have not said yet may make a start needless; wait a moment."""
        if self._now >= since + RECALL_S:
            return False
        ledger = self._ledger
        known = all(not h.asked and not h.doubtful for h in ledger.standing())
        return not known or bool(ledger.unconfirmed())

    def _refuse_elsewhere(self, choice: Choice) -> None:
        """Nothing can be started here: only who may get a slot of what is here waits on, and for a
        while who waits for nothing but memory."""
        ledger = self._ledger
        if not (ledger.standing() or ledger.starting()):
            waited_s = CROWDED_S if choice.crowded else 0.0
            reason = why_nowhere(ledger, choice.reasons)
            self.refuse("elsewhere", reason, ELSEWHERE_RETRY_S, waited_s)
        ledger.crowded = choice.crowded and ledger.total_waiting() > 0

    def _freeze_after_s(self, holding: Holding) -> float | None:
        """None: it is not to be frozen."""
        return self._ledger.current.reactive.freeze_after_s if holding.can_freeze else None

    def _may_save(self, holding: Holding) -> bool:
        return holding.can_save and holding.revision == self._ledger.revision

    def _save_after_s(self) -> float:
        """Not later than what becomes of it next."""
        reactive = self._ledger.current.reactive
        nexts = (reactive.freeze_after_s, reactive.stop_after_s)
        return min(SAVE_IDLE_S, *(after_s for after_s in nexts if after_s is not None))

    def _is_to_be_saved(self, holding: Holding) -> bool:
        due = self._may_save(holding) and self._now >= holding.save_at
        return due and self._is_idle(holding, self._save_after_s())

    def _is_to_be_put_away(self, holding: Holding) -> bool:
        after_s = away_after_s(self._ledger, holding)
        if after_s is None or self._now < holding.away_at:
            return False
        return self._is_idle(holding, after_s)

    def _rest_idle(self) -> None:
        """Save what its node wants a checkpoint of, as soon as no session uses it; stop what none
        used for `stop_after`, and put away what none used for `checkpoint_after`, but for what is
        to be kept; freeze what none used for `freeze_after`; where slots are held, ask first."""
        if self._partial:
            return
        ledger, stop_after_s = self._ledger, self._ledger.current.reactive.stop_after_s
        standing = sorted(ledger.standing(), key=lambda holding: holding.last_used)
        kept = standing[max(0, len(standing) - ledger.floor) :]
        for holding in (*standing, *ledger.unconfirmed()):
            freeze_after_s = self._freeze_after_s(holding)
            if holding.is_saving or self._is_lowered(holding, kept):
                continue
            if self._is_to_be_saved(holding):
                self._save(holding)
            elif holding not in kept and self._is_idle(holding, stop_after_s):
                self._stop(holding, f"idle for {stop_after_s:g} s")
            elif holding not in kept and self._is_to_be_put_away(holding):
                self._put_away(holding)
            elif freeze_after_s is not None and self._is_idle(holding, freeze_after_s):
                self._freeze(holding)

    def _is_idle(self, holding: Holding, after_s: float) -> bool:
        """No session used it for so long, and none can: those who hold slots are asked first."""
        if self._now < holding.last_used + after_s:
            return False
        if holding.granted and self._now >= holding.asked_at + ASK_AGAIN_S:
            holding.asked_at = self._now
            for gateway in holding.granted:
                if gateway not in holding.asked:
                    self._ask(gateway, holding, after_s)
        return not holding.granted

    def _is_lowered(self, holding: Holding, kept: Iterable[Holding]) -> bool:
        """Whether it is on its way down because its node is short of memory."""
        lowering = holding.lowering
        if lowering is None:
            return False
        over = self._now >= lowering.until or self._ledger.total_waiting()
        if not over and not self._is_idle(holding, LOWER_IDLE_S):
            return True
        holding.lowering, asked = None, lowering.asked
        if over:
            return False
        if asked.rung is Rung.LEAVE and (asked.last or holding not in kept):
            self._leave(holding, asked.reason)
            return True
        if asked.rung is Rung.REST and holding.can_freeze:
            self._freeze(holding, asked.reason)
            return True
        return False

    def _leave(self, holding: Holding, reason: str) -> None:
        """Put away, if that is what its app wants of those that leave."""
        is_kept = away_after_s(self._ledger, holding) is not None and self._now >= holding.away_at
        if is_kept:
            self._put_away(holding)
        else:
            self._stop(holding, reason)

    def _freeze(self, holding: Holding, reason: str = "") -> None:
        self._rest(holding)
        self.out.append(Freeze(holding.id, holding.node, holding.freezes, reason))

    def _rest(self, holding: Holding) -> None:
        holding.state, holding.turned_at = State.FROZEN, self._now
        holding.freezes += 1

    def _save(self, holding: Holding) -> None:
        """One of each revision on a node: the others need not be, then."""
        self._rest(holding)
        holding.is_saving = True
        for other in self._ledger.instances.values():
            if (other.node, other.revision) == (holding.node, holding.revision):
                other.save_at = math.inf
        self.out.append(Save(holding.id, holding.node, holding.freezes))

    def _put_away(self, holding: Holding) -> None:
        self._rest(holding)
        holding.state, holding.is_called = State.CHECKPOINTING, False
        self.out.append(Save(holding.id, holding.node, holding.freezes, ends=True))

    def _thaw(self, holding: Holding) -> None:
        """If it is frozen."""
        if holding.state is State.FROZEN:
            holding.state, holding.turned_at = State.READY, self._now
            holding.trace, holding.is_saving = SAVED if holding.is_saving else THAW, False
            self.out.append(Thaw(holding.id, holding.node))

    def _thaw_used(self) -> None:
        """What gateways hold slots of is not frozen: a home before this one gave them, or its word
        to thaw it was lost."""
        for holding in self._ledger.instances.values():
            if holding.granted:
                self._thaw(holding)

    def _stop_drained(self) -> None:
        if self._partial:
            return
        for holding in self._ledger.draining():
            if not holding.granted or self._now >= holding.drain_until:
                self._stop(holding, holding.draining)

    def _stop(self, holding: Holding, reason: str) -> None:
        holding.state, holding.draining = State.STOPPING, reason
        self.out.append(Stop(self._ledger.key, holding.id, holding.node, reason))
