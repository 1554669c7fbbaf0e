"""A day of sessions of 10,000 apps, as recorded in `bench/traces/day.json`.

    .venv/bin/python bench/day.py        writes the file anew

It is made, not measured, from what was measured elsewhere: how unequal the popularity of hosted
apps is, and how it goes up and down with the day, are those of Azure Functions (M. Shahrad and
others, "Serverless in the Wild", USENIX ATC 2020): the 18.6 % most popular apps have 99.6 % of the
invocations, which is a Zipf distribution with the exponent below, and the least of the day is half
of its peak. Beside that come flash crowds, of apps that hardly anybody asked for before.
The file is what this generator makes (a test compares), so it is the same for everyone and always.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import NamedTuple

FILE = Path(__file__).with_name("traces") / "day.json"
APPS = 10_000
EXPONENT = 1.62
POPULAR_SHARE, POPULAR_SESSIONS = 0.186, 0.996
SESSIONS = 8_000
"""Beside those of flash crowds."""
DAY_S = 86_400
TICKS_S = 0.1
"""Moments are told in tenths of seconds."""
LEAST = 0.5
"""Of the day, as a share of the peak, which is in the afternoon."""
PEAK_AT = 15 / 24
CROWDS = 4
CROWD_SESSIONS, CROWD_S = 300, 3_600
CROWD_RANKS = 1_000, 5_000


class Session(NamedTuple):
    """`at`: seconds since the day began; `app`: its rank, the most popular is 0."""

    at: float
    app: int


class Crowd(NamedTuple):
    app: int
    begins: float
    ends: float


class Day(NamedTuple):
    sessions: list[Session]
    crowds: list[Crowd]


def make_day(seed: int = 2_020) -> Day:
    dice = Random(seed)
    weights = list(accumulate((rank + 1) ** -EXPONENT for rank in range(APPS)))
    sessions = [
        Session(at, bisect(weights, dice.random() * weights[-1])) for at in _moments(dice, SESSIONS)
    ]
    crowds = list(_crowds(dice))
    for crowd in crowds:
        moments = (dice.uniform(crowd.begins, crowd.ends) for _ in range(CROWD_SESSIONS))
        sessions += [Session(_round(at), crowd.app) for at in moments]
    return Day(sorted(sessions), crowds)


def _moments(dice: Random, count: int) -> Iterator[float]:
    """As many as there are at each time of the day, by rejection."""
    while count:
        share = dice.random()
        height = (1 + LEAST + (1 - LEAST) * math.cos(2 * math.pi * (share - PEAK_AT))) / 2
        if dice.random() < height:
            yield _round(share * DAY_S)
            count -= 1


def _crowds(dice: Random) -> Iterator[Crowd]:
    """One in each part of the day, of different apps."""
    for number in range(CROWDS):
        begins = DAY_S * (number + dice.uniform(0.2, 0.7)) / CROWDS
        yield Crowd(dice.randrange(*CROWD_RANKS), _round(begins), _round(begins + CROWD_S))


def _round(at: float) -> float:
    return round(round(at / TICKS_S) * TICKS_S, 1)


def popular_share(day: Day) -> float:
    """Of its sessions, those of the most popular apps, flash crowds left out."""
    crowded = {crowd.app for crowd in day.crowds}
    counts = Counter(session.app for session in day.sessions if session.app not in crowded)
    popular = sum(count for app, count in counts.items() if app < APPS * POPULAR_SHARE)
    return popular / counts.total()


def encode_day(day: Day) -> str:
    """Ticks since the one before and ranks, as variable-length integers, packed."""
    numbers, before = bytearray(), 0
    for session in day.sessions:
        tick = round(session.at / TICKS_S)
        for number in (tick - before, session.app):
            numbers += _varint(number)
        before = tick
    packed = base64.b64encode(zlib.compress(bytes(numbers), 9)).decode()
    lines = [packed[start : start + 96] for start in range(0, len(packed), 96)]
    return json.dumps({"crowds": day.crowds, "sessions": lines}, indent=0) + "\n"


def parse_day(text: str) -> Day:
    told = json.loads(text)
    numbers = _integers(zlib.decompress(base64.b64decode("".join(told["sessions"]))))
    sessions, tick = [], 0
    for step, app in zip(numbers, numbers, strict=True):
        tick += step
        sessions.append(Session(round(tick * TICKS_S, 1), app))
    return Day(sessions, [Crowd(*crowd) for crowd in told["crowds"]])


def load_day() -> Day:
    return parse_day(FILE.read_text())


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*out, number))


def _integers(data: bytes) -> Iterator[int]:
    number, shift = 0, 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number, shift = 0, 0


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(encode_day(make_day()))
