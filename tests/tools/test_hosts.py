"""free, uptime, w, df and vmstat: pure, and against this machine's own programs of those names."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.tools.conftest import EVIL, Pretended, Run, check_refusal, reply

from tabane.errors import UsageError
from tabane.k2i.host import HostReader, Place
from tabane.k2i.mounts import MountReader
from tabane.tools.cli import df, free, repeating, uptime, vmstat
from tabane.tools.cli.repeating import every, seconds
from tabane.tools.cli.sizes import parse_unit, rounded_up, scaled

NOW = 1_700_000_000.0
HERE = Place("tokyo", "tokyo-1", "i-1")


def as_json(row: msgspec.Struct) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(msgspec.json.encode(row))
    return found


@pytest.fixture
def host() -> dict[str, Any]:
    """This machine, as a node tells it."""
    return as_json(HostReader(HERE).read()) | {"users": 2}


@pytest.fixture(autouse=True)
def utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def real(*argv: str) -> list[str]:
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    environment.pop("COLUMNS", None)
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    return done.stdout.splitlines()


def answer(kind: str, *rows: Any, silent: tuple[str, ...] = ()) -> bytes:
    nodes = [{"node": "tokyo/tokyo-1", "incarnation": "i-1", "age_s": 0.01}]
    return reply({kind: rows, "nodes": nodes, "silent": silent, "at": 0.0})


# Sizes


def test_sizes_are_rounded_up_as_numfmt_does() -> None:
    dice = random.Random(1)
    numbers = [int(10 ** dice.uniform(0, 18)) for _ in range(300)]
    numbers += [1024**n * k for n in range(6) for k in (1, 9, 10, 1023, 1024)] + [1127, 10189, 0]
    for option, base in (("iec", 1024), ("si", 1000)):
        text = "\n".join(map(str, numbers))
        argv = ["numfmt", f"--to={option}", "--round=up"]
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=True)
        expected = done.stdout.split()
        assert [rounded_up(n, base=base).upper() for n in numbers] == [t.upper() for t in expected]


@pytest.mark.parametrize(
    ("size", "iec", "si"),
    [
        (0, "0B", "0B"),
        (999, "999B", "999B"),
        (1023, "1.0Ki", "1.0K"),
        (24684084 << 10, "23Gi", "25G"),
        (535268 << 10, "522Mi", "548M"),
        (1039244 << 10, "1.0Gi", "1.1G"),
        (11664 << 10, "11Mi", "11M"),
    ],
)
def test_sizes_as_free_writes_them(size: int, iec: str, si: str) -> None:
    assert (scaled(size), scaled(size, base=1000)) == (iec, si)


def test_units() -> None:
    assert [parse_unit(text) for text in ("1", "K", "4K", "MB", "MiB")] == [
        1,
        1024,
        4096,
        1_000_000,
        1 << 20,
    ]
    for text in ("", "0", "x", "B", "KX", "-1", "9" * 30):
        with pytest.raises(UsageError, match="is no unit"):
            parse_unit(text)


# free


@pytest.mark.parametrize(
    "argv", ["", "-b", "-m", "-g", "-h", "-h --si", "--mega", "-w", "-t", "-wlvt"]
)
def test_free_shows_what_free_shows(argv: str, host: dict[str, Any]) -> None:
    """All headings and totals; what is used moves between two looks."""
    shown = free.render([host], free._parser().parse_args(argv.split()))
    expected = real("free", *argv.split())
    assert shown[0].split() == ["DC", "NODE", *expected[0].split()]
    for line, other in zip(shown[1:], expected[1:], strict=True):
        words, others = line.split(), other.split()
        assert words[:2] == ["tokyo", "tokyo-1"]
        assert words[2:4] == others[:2]
        assert len(words) == len(others) + 2


def test_free_again_and_again(
    host: dict[str, Any], tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(repeating, "pause", pauses.append)
    pretended.begin(tokyo=answer("host", host, silent=("nara/nara-1",)))
    ended = tabane("free", "-s", "5", "-c", "3", "-h")
    assert (ended.code, ended.err) == (1, "tabane: no answer from nara/nara-1\n" * 3)
    assert ended.out.count("Mem:") == 3 and ended.out.count("\n\n") == 2
    assert len(pauses) == 2
    assert len(pretended.nodes["tokyo"].asked) == 3
    line = pretended.nodes["tokyo"].asked[0][0]
    assert line == "GET /v2/host?scope=cluster&fields=dc,node,memory"


def test_moments_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(repeating.SYSTEM, "now", lambda: now[0], raising=False)
    moments = []

    def pause(span: float) -> None:
        now[0] += span

    monkeypatch.setattr(repeating, "pause", pause)
    for _ in every(10.0, 4):
        moments.append(now[0])
        now[0] += 3.0
    assert moments == [100.0, 110.0, 120.0, 130.0]


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "nan", "inf", "1e3", ".", "9" * 8])
def test_what_is_no_number_of_seconds(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        seconds(text)
    assert (seconds("0.5"), seconds("2")) == (0.5, 2.0)


# uptime


@pytest.mark.parametrize(
    ("uptime_s", "users", "shown", "words"),
    [
        (30, 0, " 22:13:20 up 0 min,  0 user,  load average: 1.00, 0.50, 0.25", "up 0 minutes"),
        (3660, 1, " 22:13:20 up  1:01,  1 user,  load", "up 1 hour, 1 minute"),
        (86400 + 600, 2, " 22:13:20 up 1 day, 10 min,  2 users,  load", "up 1 day, 10 minutes"),
        (
            15 * 86400 + 36600,
            2,
            " up 15 days, 10:10,  2",
            "up 2 weeks, 1 day, 10 hours, 10 minutes",
        ),
    ],
)
def test_uptimes(uptime_s: float, users: int, shown: str, words: str) -> None:
    row = {"uptime_s": uptime_s, "users": users, "load_1": 1, "load_5": 0.5, "load_15": 0.25}
    assert shown in uptime.summary(row, NOW)
    assert uptime.in_words(row, NOW) == words


@pytest.mark.parametrize("option", ["", "-p", "-s"])
def test_uptime_says_what_uptime_says(
    option: str, host: dict[str, Any], tabane: Run, pretended: Pretended
) -> None:
    pretended.begin(tokyo=answer("host", host | {"users": 0}))
    ended = tabane("uptime", *option.split())
    (expected,) = real("uptime", *option.split())
    place, _, text = ended.out.partition("tokyo-1 ")
    assert place == "tokyo "
    shapes = [re.sub("[0-9]+", "0", said).strip() for said in (text, expected)]
    assert shapes[0] == shapes[1]


# w

LOGIN = {"dc": "tokyo", "node": "tokyo-1", "user": "ann", "tty": "pts/0", "host": "10.0.0.9"}
LOGIN |= {"pid": 7, "login_at": 0.0, "login_age_s": 3600.0, "idle_s": 125.0, "jcpu_s": 2.5}
LOGIN |= {"pcpu_s": 0.25, "what": "vi", "incarnation": "i-1"}


def test_w(tabane: Run, pretended: Pretended, host: dict[str, Any]) -> None:
    odd = LOGIN | {"user": EVIL, "host": "", "idle_s": None, "what": EVIL}

    def tell(line: str, _: bytes) -> bytes:
        return answer("host", host) if "/v2/host" in line else answer("logins", LOGIN, odd)

    pretended.begin(tokyo=tell)
    first, heading, ann, other = tabane("w").out.splitlines()
    assert first.startswith("tokyo tokyo-1  ") and "load average" in first
    assert " ".join(heading.split()) == "DC NODE USER TTY FROM LOGIN@ IDLE JCPU PCPU WHAT"
    assert ann.split()[2:5] == ["ann", "pts/0", "10.0.0.9"]
    assert ann.split()[6:] == ["2:05", "2.50s", "0.25s", "vi"]
    assert "\\x1b[2J" in other
    assert tabane("w", "-h", "-s", "ann").out.split() == [
        "tokyo",
        "tokyo-1",
        "ann",
        "pts/0",
        "10.0.0.9",
        "2:05",
        "vi",
    ]
    assert tabane("w", "-hsf", "ann").out.split() == [
        "tokyo",
        "tokyo-1",
        "ann",
        "pts/0",
        "2:05",
        "vi",
    ]
    assert len(pretended.nodes["tokyo"].asked) == 4
    assert tabane("w", "--user", "ann", "--dc", "tokyo").code == 0
    lines = [line for line, _ in pretended.nodes["tokyo"].asked[4:]]
    assert (
        sorted(line.split("&", 1)[1] for line in lines)[0]
        == "dc=tokyo&" + "fields=" + uptime.FIELDS
    )


@pytest.mark.parametrize(
    ("span", "shown"),
    [
        (0, "0.00s"),
        (59.994, "59.99s"),
        (61, "1:01"),
        (3600, "1:00m"),
        (172800, "2days"),
        (None, "?"),
    ],
)
def test_spans(span: float | None, shown: str) -> None:
    assert uptime.span(span) == shown


@pytest.mark.parametrize(
    ("age_s", "shown"), [(60, "22:12"), (23 * 3600, "Mon23"), (30 * 86400, "15Oct23")]
)
def test_login_moments(age_s: float, shown: str) -> None:
    assert uptime.login_at(age_s, NOW) == shown


# df


@pytest.fixture(scope="module")
def mounts() -> list[dict[str, Any]]:
    return [as_json(mount) for mount in MountReader(HERE).read()]


@pytest.mark.parametrize(
    "argv", ["", "-h", "-H", "-T", "-i", "-ih", "-P", "-m", "-BM", "-B 4K", "-h -T",
             "-t tmpfs", "-x tmpfs", "-l", "/", "/proc/self", "-h / /dev/shm", "-BGB",
             "-a -t proc"],
)  # fmt: skip
def test_df_shows_what_df_shows(argv: str, mounts: list[dict[str, Any]]) -> None:
    """But for what moves between two looks: all figures that are not of a whole file system."""
    args = df._parser().parse_args(argv.split())
    style = df.style_of(args)
    if args.files:
        found_there = MountReader(HERE).read_holding(args.files, looks=True)
        mounts = [as_json(mount) for mount in found_there]
    shown = df.render(df.choose(mounts, args), style, with_type=args.with_type)
    expected = real("df", *argv.split())
    heading = ["DC", "NODE", *expected[0].split()]
    assert shown[0].split() == heading
    kept = 4 if args.with_type else 3
    found = [[*line.split()[2 : kept + 1], line.split()[-1]] for line in shown[1:]]
    assert found == [[*line.split()[: kept - 1], line.split()[-1]] for line in expected[1:]]


MOUNT = {"dc": "tokyo", "node": "tokyo-1", "device": "/dev/vda", "type": "ext4", "device_id": "8:1"}
MOUNT |= {"mount_point": "/", "size_kib": 2048, "used_kib": 1900, "available_kib": 100}
MOUNT |= {"used_percent": 95, "inodes": 10, "inodes_used": 5, "inodes_free": 5, "problem": ""}
MOUNT |= {"hidden": False, "file": ""}
LATE = MOUNT | {"mount_point": "/mnt", "type": "nfs4", "device": "far:/x", "device_id": "0:9"}
LATE |= {name: None for name in MOUNT if name.endswith(("kib", "percent")) or "inodes" in name}
LATE |= {"problem": "it does not answer"}


def test_df(tabane: Run, pretended: Pretended) -> None:
    other = MOUNT | {"dc": "osaka", "node": "osaka-1"}
    covered = LATE | {"mount_point": "/old", "hidden": True, "problem": "No such file"}
    bound = MOUNT | {"mount_point": "/bound"}
    pretended.begin(tokyo=answer("mounts", MOUNT, bound, LATE, covered, other))
    ended = tabane("df", "-h", "--total")
    assert (ended.code, ended.err) == (1, "tabane: tokyo/tokyo-1: /mnt: it does not answer\n")
    assert ended.out.splitlines() == [
        "DC    NODE    Filesystem Size Used Avail Use% Mounted on",
        "osaka osaka-1 /dev/vda   2.0M 1.9M  100K  95% /",
        "tokyo tokyo-1 /dev/vda   2.0M 1.9M  100K  95% /",
        "tokyo tokyo-1 far:/x        -    -     -    - /mnt",
        "osaka osaka-1 total      2.0M 1.9M  100K  95% -",
        "tokyo tokyo-1 total      2.0M 1.9M  100K  95% -",
    ]
    assert len(json.loads(tabane("df", "--json", "-t", "ext4").out)["mounts"]) == 2
    assert tabane("df", "-l").code == 0
    assert tabane("df", "-a").out.splitlines()[-1].endswith("- /old")
    for word in ("nothing", ""):
        check_refusal(tabane("df", word), 2, f"df: {word!r}: write the whole path")
    check_refusal(tabane("df", "-B", "7x"), 2, "'7x' is no unit")
    check_refusal(tabane("df", "-h", "-k"), 2, "df: -k: not allowed with")


def test_df_of_files(tabane: Run, pretended: Pretended) -> None:
    """One that some node has need not be on all; what nobody has is an error, once."""
    osaka = {"dc": "osaka", "node": "osaka-1"}
    here, far = MOUNT | {"file": "/a,b"}, LATE | {"file": "/mnt/x"}
    none = dict.fromkeys(("device", "type", "mount_point", "device_id"), "")
    gone = LATE | none | {"problem": "No such file or directory", "hidden": True}
    rows = [here, far, gone | {"file": "/c"}]
    rows += [gone | osaka | {"file": file} for file in ("/a,b", "/mnt/x", "/c")]
    pretended.begin(tokyo=answer("mounts", *rows))
    ended = tabane("df", "/a,b", "/mnt/x", "/c")
    assert pretended.nodes["tokyo"].asked[0][0].endswith("&file=%2Fa%2Cb%00%2Fmnt%2Fx%00%2Fc")
    assert (ended.code, ended.err.splitlines()) == (
        1,
        [
            "tabane: tokyo/tokyo-1: /mnt: it does not answer",
            "tabane: df: /c: No such file or directory",
        ],
    )
    assert [line.split()[-1] for line in ended.out.splitlines()] == ["on", "/", "/mnt"]
    assert len(json.loads(tabane("df", "--json", "/a,b", "/mnt/x", "/c").out)["mounts"]) == 6
    assert tabane("df", "-t", "nfs4", "/a,b").code == 1


def test_df_of_a_file_that_is_somewhere(tabane: Run, pretended: Pretended) -> None:
    here = MOUNT | {"file": "/srv"}
    gone = here | {"dc": "osaka", "node": "osaka-1", "type": "", "mount_point": "", "hidden": True}
    pretended.begin(tokyo=answer("mounts", here, gone | {"problem": "No such file or directory"}))
    ended = tabane("df", "/srv")
    assert (ended.code, ended.err) == (0, "")
    ended = tabane("df", "-t", "zfs", "/srv")
    assert (ended.code, ended.err) == (1, "tabane: df: no node has a file system for /srv\n")


# vmstat


def test_vmstat_since_the_start(host: dict[str, Any]) -> None:
    title, heading, line = vmstat.render([host], {}, "K")
    expected = real("vmstat")
    assert title.strip() == expected[0]
    assert heading.split() == ["DC", "NODE", *expected[1].split()]
    numbers = list(map(int, line.removeprefix("tokyo tokyo-1 ").split()))
    others = list(map(int, expected[2].split()))
    assert len(numbers) == len(others)
    assert numbers[2] == others[2]
    for column in range(12, 17):  # shares of all time since the start hardly move
        assert abs(numbers[column] - others[column]) <= 1
    assert vmstat.render([host], {}, "K", active=True)[1].split()[6:8] == ["inact", "active"]


def test_vmstat_between_two_looks() -> None:
    cpu = {f"{name}_s": 0.0 for name, _ in vmstat.CPU_LINES} | {"softirq_s": 0.0}
    first = {"boot_id": "b", "uptime_s": 100.0, "procs_running": 1, "procs_blocked": 0, "cpu": cpu}
    first |= {"memory": {"swap_used_kib": 0, "free_kib": 4096, "buffers_kib": 0, "cache_kib": 0}}
    first |= {"interrupts": 0, "context_switches": 1000}
    first |= {"vmstat": {"pgpgin": 100, "pgpgout": 0, "pswpin": 5, "pswpout": 0}}
    used = cpu | {"user_s": 1.0, "nice_s": 1.0, "idle_s": 7.0, "iowait_s": 0.5, "irq_s": 0.5}
    later = first | {"uptime_s": 110.0, "context_switches": 2000, "cpu": used}
    later |= {"vmstat": {"pgpgin": 200, "pgpgout": 0, "pswpin": 15, "pswpout": 0}}
    expected = [1, 0, 0, 4096, 0, 0, 4, 0, 10, 0, 0, 100, 20, 5, 70, 5, 0]
    assert vmstat.figures(later, first, 1024, active=False) == expected
    again = later | {"boot_id": "c"}
    assert vmstat.figures(again, first, 1024, active=False)[11] == round(2000 / 110)


def test_vmstat_s(host: dict[str, Any]) -> None:
    lines = [line.removeprefix("tokyo tokyo-1 ") for line in vmstat.counters(host, 1024)]
    expected = real("vmstat", "-s")
    assert [line.lstrip(" 0123456789") for line in lines] == [
        line.lstrip(" 0123456789") for line in expected
    ]
    assert lines[0] == expected[0]
    assert abs(int(lines[-2].split()[0]) - int(expected[-2].split()[0])) <= 1


def test_vmstat_repeats(
    host: dict[str, Any], tabane: Run, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeating, "pause", lambda _: None)
    pretended.begin(tokyo=answer("host", host))
    lines = tabane("vmstat", "1", "25").out.splitlines()
    assert [n for n, line in enumerate(lines) if "procs" in line] == [0, 22]
    assert len(tabane("vmstat", "-n", "1", "25").out.splitlines()) == 27
    assert tabane("vmstat", "-s").out.splitlines() == vmstat.counters(host, 1024)
    check_refusal(tabane("vmstat", "x"), 2, "vmstat: DELAY: 'x' is no number of seconds")
    check_refusal(tabane("vmstat", "-S", "x"), 2, "vmstat: -S/--unit: 'x' is none of k, K, m, M")
