"""What nodes say to each other of processes: questions to k2i and their answers, changes that are
followed, and orders.
"""

from __future__ import annotations

from tabane.k2i.orders import InstanceOrder, InstanceOutcome, Order, Outcome
from tabane.k2i.service import Part, Question
from tabane.model import Value
from tabane.security.identity import Principal


class AskK2i(Value, frozen=True, tag="ask_k2i"):
    """To agents: what your k2i says to this, asked by `who`. Answered with `K2iPart`."""

    question: Question
    who: Principal


class K2iPart(Value, frozen=True, tag="k2i_part"):
    """A node's answer. `packed`: its rows are compressed with zlib; of `size` bytes in all when
    there is `more`, the number to ask for the rest by."""

    part: Part
    packed: bool = False
    more: int = 0
    size: int = 0


class MoreOfK2i(Value, frozen=True, tag="more_of_k2i"):
    """To the agent that answered with `more`: what follows from `offset`, as bytes. May be
    repeated, for some seconds."""

    number: int
    offset: int


class FollowK2i(Value, frozen=True, tag="follow_k2i"):
    """To all agents: tell me what changes among your processes, as `K2iChanges` with this `key`.
    Repeated every few seconds: that a node goes on, or begins when it has not begun. `asked_at` is
    when this was sent, by the asker's own clock, to be told back."""

    key: str
    question: Question
    who: Principal
    asked_at: float = 0.0


class K2iChanges(Value, frozen=True, tag="k2i_changes"):
    """To the agent that follows: a message of k2i, or a piece of one when there is `more`. The next
    is sent when this one was taken. The age that it says was right `after_s` after the `FollowK2i`
    of `asked_at` was heard. `ended`: there are no more, until the next `FollowK2i` begins anew."""

    key: str
    data: bytes
    more: bool = False
    asked_at: float = 0.0
    after_s: float = 0.0
    ended: bool = False


class UnfollowK2i(Value, frozen=True, tag="unfollow_k2i"):
    """To all agents: it is enough. Whoever does not hear it is refused the next `K2iChanges`."""

    key: str


class ActK2i(Value, frozen=True, tag="act_k2i"):
    """Agent to the agent that has the targets: obey this order of `who`. Answered with `ActedK2i`.
    A repeat is obeyed again, unless the order has an idempotency key."""

    order: Order
    who: Principal


class ActedK2i(Value, frozen=True, tag="acted_k2i"):
    """In the order of the targets."""

    outcomes: tuple[Outcome, ...]


class ActOnInstance(Value, frozen=True, tag="act_on_instance"):
    """The same for an instance. Answered with `ActedOnInstance`."""

    order: InstanceOrder
    who: Principal


class ActedOnInstance(Value, frozen=True, tag="acted_on_instance"):
    outcome: InstanceOutcome


K2iMessage = (
    AskK2i
    | K2iPart
    | MoreOfK2i
    | FollowK2i
    | K2iChanges
    | UnfollowK2i
    | ActK2i
    | ActedK2i
    | ActOnInstance
    | ActedOnInstance
)
