"""middlecon: one message to many processes, and the sender knows who got it."""

from tabane.middlecon.agreement import Agreement, Outcome, Proposal
from tabane.middlecon.client import Client, Room, WhenSlow, connect
from tabane.middlecon.frames import Change
from tabane.middlecon.hub import Hub
from tabane.middlecon.inbox import Message
from tabane.middlecon.linking import Peer
from tabane.middlecon.own_state import OwnState
from tabane.middlecon.receipts import Cause, Reason, Receipt, Replies
from tabane.middlecon.session import Limits
from tabane.middlecon.views import MemberInfo, Presence, StateChange

__all__ = [
    "Agreement",
    "Cause",
    "Change",
    "Client",
    "Hub",
    "Limits",
    "MemberInfo",
    "Message",
    "Outcome",
    "OwnState",
    "Peer",
    "Presence",
    "Proposal",
    "Reason",
    "Receipt",
    "Replies",
    "Room",
    "StateChange",
    "WhenSlow",
    "connect",
]
