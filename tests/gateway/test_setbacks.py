import pytest

from tabane.gateway.setbacks import BACKOFF_FIRST_S, BACKOFF_LAST_S, RETRY_S, Setbacks


def pauses(setbacks: Setbacks, kinds: str) -> list[float]:
    """`s`: a failed start, `f`: a final one, `e`: an early end."""
    found = []
    for kind in kinds:
        if kind == "e":
            setbacks.add_early_end("it crashed", 100.0)
        else:
            setbacks.add_failed_start("it exits", 100.0, retry=kind == "s")
        found.append(setbacks.left_s(100.0))
    return found


@pytest.mark.parametrize(
    ("kinds", "first"), [("ssss", RETRY_S), ("ffff", BACKOFF_FIRST_S), ("eeee", 0), ("eses", 0)]
)
def test_pauses_grow_whatever_goes_wrong(kinds: str, first: float) -> None:
    growing = [BACKOFF_FIRST_S * 2**n for n in (1, 2, 3)]
    assert pauses(Setbacks(), kinds) == pytest.approx([first, *growing])


def test_pauses_have_an_end() -> None:
    assert pauses(Setbacks(), "e" * 5000)[-1] == BACKOFF_LAST_S


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ("", ""),
        ("e", "ended right after its start once: it crashed"),
        ("s", "did not start once: it exits; next try in 1 s"),
        ("eee", "ended right after its start 3 times: it crashed; next try in 2 s"),
        (
            "sse",
            "did not start twice and ended right after its start once: it crashed; next try in 2 s",
        ),
    ],
)
def test_it_says_what_happened_and_what_comes_next(kinds: str, text: str) -> None:
    setbacks = Setbacks()
    pauses(setbacks, kinds)
    assert setbacks.describe(100.0) == text


def test_when_the_pause_is_over_it_says_only_what_happened() -> None:
    setbacks = Setbacks()
    pauses(setbacks, "ee")
    assert setbacks.describe(200.0) == "ended right after its start twice: it crashed"


def test_only_the_last_setback_says_whether_there_is_something_to_wait_for() -> None:
    setbacks = Setbacks()
    pauses(setbacks, "f")
    assert setbacks.is_final
    pauses(setbacks, "e")
    assert not setbacks.is_final


def test_what_is_forgiven_is_forgotten() -> None:
    setbacks = Setbacks()
    pauses(setbacks, "ffe")
    setbacks.forgive()
    assert (setbacks.count, setbacks.describe(100.0), setbacks.left_s(100.0)) == (0, "", 0.0)
