"""What a deploy refuses, and what it warns of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tabane.api.deploying import MOST_BYTES, AppFile, deploy, deploy_all, owner_for
from tabane.clock import SYSTEM
from tabane.errors import Denied, SpecError, UsageError
from tabane.model import Class
from tabane.node import messages as say
from tabane.node.answering import Answers
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


def node_of_straw(**more: Any) -> Any:
    """What a deploy needs of an agent; `told` is what it asked of the control node."""
    agent = SimpleNamespace(told=[], config=SimpleNamespace(), **more)
    agent.images = SimpleNamespace(kind_of=lambda digest: "linux")
    agent.engines = SimpleNamespace(
        drivers={
            "crun": SimpleNamespace(
                name="crun",
                isolation=Class.CONTAINER,
                capabilities=SimpleNamespace(images=("host", "linux"), pods=True),
            )
        }
    )
    agent.config.cluster = SimpleNamespace(datacenters=lambda: ["tokyo"])
    agent.all_views = list
    agent.audit, agent.clock = SimpleNamespace(add=lambda line: None), SYSTEM

    async def control(request: Any) -> Any:
        agent.told.append(request)
        return say.DeployedApps(tuple(say.Deployed(app, 7) for app in request.apps))

    async def ask_all(request: Any, timeout_s: float) -> Answers:
        agent.told.append(request)
        return Answers({}, ())

    agent.control, agent.ask_all = control, ask_all
    return agent


def file_of(name: str, more: str = "") -> AppFile:
    text = f'name = "{name}"\nimage = "host"\ncommand = ["true"]\nport = 80\n{more}'
    return AppFile(text, f"{name}.toml", "host")


async def test_many_are_one_transaction_and_one_question_who_knows_them() -> None:
    agent = node_of_straw()
    told = await deploy_all(agent, Principal("token"), [file_of(f"a{n}") for n in range(50)])
    deployed, known = agent.told
    assert [app.key for app in deployed.apps] == [f"default/a{n}" for n in range(50)]
    assert known == say.AskKnown(7)
    assert told["apps"][3] == {
        "namespace": "default",
        "name": "a3",
        "revision": 0,
        "changed": True,
        "warnings": [],
    }


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (file_of("x", 'class = "vm"\n'), "x.toml:5: class: no driver runs class vm"),
        (file_of("a1"), "a1.toml: another of these files is for default/a1, too"),
        (file_of("x", "#" * MOST_BYTES), "these 4 files have 5[0-9]* bytes together"),
    ],
)
async def test_nothing_is_asked_for_when_one_of_many_is_wrong(last: AppFile, words: str) -> None:
    agent = node_of_straw()
    with pytest.raises(UsageError, match=words):
        await deploy_all(agent, Principal("token"), [*(file_of(f"a{n}") for n in range(3)), last])
    assert agent.told == []
