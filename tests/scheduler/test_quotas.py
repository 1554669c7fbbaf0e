import pytest

from tabane.model import App, Resources
from tabane.scheduler.quotas import Account, Quota, Quotas, Usage, exceeded

APP = App("web", "host", owner=1000, resources=Resources(memory_bytes=64 << 20))


@pytest.mark.parametrize(
    ("quota", "usage", "problem"),
    [
        (Quota(), Usage(10_000, 1 << 60, 10_000), ""),
        (Quota(instances=3), Usage(2), ""),
        (Quota(instances=3), Usage(3), "user 1000 has 3 instances on it, and may have 3"),
        (Quota(instances=0), Usage(), "user 1000 has 0 instances on it, and may have 0"),
        (Quota(memory_bytes=128 << 20), Usage(1, 64 << 20), ""),
        (
            Quota(memory_bytes=128 << 20),
            Usage(1, 65 << 20),
            "user 1000 has 63.0 MiB of memory left on it, 64.0 MiB are needed",
        ),
        (Quota(starts=4), Usage(starts=4), "user 1000 has 4 starts waiting on it, and may have 4"),
    ],
)
def test_what_is_too_much(quota: Quota, usage: Usage, problem: str) -> None:
    assert exceeded(APP, Account(quota, usage)) == problem


def test_the_default_is_everyones_but_roots() -> None:
    quotas = Quotas(Quota(instances=5), {7: Quota(starts=1)})
    assert quotas.of(1000) == Quota(instances=5)
    assert quotas.of(7) == Quota(starts=1), "and who has one of their own has that alone"
    assert quotas.of(0) == Quota()
    assert Quotas(users={0: Quota(starts=1)}).of(0) == Quota(starts=1)
