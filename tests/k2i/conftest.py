import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a Python program that sets something up and then sleeps; ended with the test."""
    children: list[subprocess.Popen[bytes]] = []

    def start(setup: str = "", *args: str) -> subprocess.Popen[bytes]:
        program = f"import ctypes, os, sys, time\n{setup}\nprint(flush=True)\ntime.sleep(1000)"
        child = subprocess.Popen(
            [sys.executable, "-c", program, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        children.append(child)
        assert child.stdout and child.stdout.readline() == b"\n"
        while b") S" not in Path(f"/proc/{child.pid}/stat").read_bytes():
            time.sleep(0.001)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()
