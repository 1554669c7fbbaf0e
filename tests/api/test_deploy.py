"""What a deploy refuses, and what it warns of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.api.deploying import AppFile, deploy
from tabane.errors import SpecError
from tabane.model import Class
from tabane.runtimes.api import Image
from tabane.security.identity import Principal

DIGEST = "sha256:" + "0" * 64
TEXT = 'name = "a"\nclass = "unikernel"\nimage = "solo5:busybox"\nport = 80\n'


async def test_a_program_that_is_no_unikernel_is_refused(tmp_path: Path) -> None:
    """Though it is an ELF file for the right processor."""
    (tmp_path / "busybox").write_bytes(b"\x7fELF\x02\x01" + bytes(12) + b"\x3e\0" + bytes(100))
    image = Image(DIGEST, tmp_path, entrypoint=("/busybox",), kind="solo5")

    async def prepare(digest: str, source: str) -> Image:
        return image

    driver = SimpleNamespace(
        name="solo5-spt",
        isolation=Class.UNIKERNEL,
        capabilities=SimpleNamespace(images=("solo5",), pods=False),
    )
    store = SimpleNamespace(has=lambda digest: True)
    images = SimpleNamespace(store=store, kind_of=lambda digest: "solo5", prepare=prepare)
    engines = SimpleNamespace(drivers={"solo5-spt": driver})
    agent: Any = SimpleNamespace(images=images, engines=engines)
    with pytest.raises(SpecError, match="it has no ABI1 note of solo5"):
        await deploy(agent, Principal("token"), AppFile(TEXT, "a.toml", DIGEST))
