"""When an instance counts as one that hangs: a plain function of what its checks found."""

from __future__ import annotations

from dataclasses import dataclass

from tabane.reactions import Health


@dataclass(slots=True)
class Record:
    """What the checks of one instance found so far; `began`: when it became ready, monotonic s."""

    policy: Health
    began: float
    has_passed: bool = False
    failures: int = 0
    """In a row, that count."""

    def on_check(self, problem: str, now: float) -> str:
        """One was made: `problem` says what is wrong, or is empty. Returns why the instance is to
        be stopped; empty: it is not."""
        if not problem:
            self.has_passed, self.failures = True, 0
            return ""
        if not self.has_passed and now < self.began + self.policy.startup_s:
            return ""
        self.failures += 1
        if self.failures < self.policy.failures:
            return ""
        often = f", {self.failures} times in a row" if self.failures > 1 else ""
        return f"unhealthy: {problem}{often}"

    def on_rest(self) -> None:
        """It was frozen, or stood still by order: what failed before says nothing of it now."""
        self.failures = 0
