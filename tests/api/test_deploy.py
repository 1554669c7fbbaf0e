"""What a deploy refuses, and what it warns of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.api.deploying import AppFile, deploy, owner_for
from tabane.errors import Denied, SpecError
from tabane.model import Class
from tabane.node.control import SAME_OWNER
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


@pytest.mark.parametrize(
    ("who", "wanted", "owner"),
    [
        (Principal("token"), None, SAME_OWNER),
        (Principal("peer", 0), None, SAME_OWNER),
        (Principal("token"), 1000, 1000),
        (Principal("peer", 0), 0, 0),
        (Principal("peer", 1000), None, 1000),
        (Principal("peer", 1000), 1000, 1000),
    ],
)
def test_whose_an_app_is_to_be(who: Principal, wanted: int | None, owner: int) -> None:
    assert owner_for(who, wanted) == owner


def test_nobody_but_root_deploys_in_anothers_name() -> None:
    with pytest.raises(Denied, match="uid 1000 may not deploy in the name of uid 0"):
        owner_for(Principal("peer", 1000), 0)
