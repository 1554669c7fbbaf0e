"""The programs in the pages about middlecon run as they are written, and print what they say."""

from __future__ import annotations

import ast
import asyncio
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "middlecon.md").read_text()
PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)


async def run(program: str) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", program),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    return out.decode().splitlines()


def shown_by_the_page(line: str) -> bool:
    return f"    {line}\n" in PAGE


async def test_the_programs_print_what_the_page_says(cluster):
    await cluster.hub()
    here = PAGE.replace("tcp://127.0.0.1:8080", cluster.url())
    asking, agreeing, blocking = PROGRAM.findall(here)
    assert await run(asking) == ["0 {}", "{}", "{'py-1': {'load': b'0.5'}}"]
    answers = {"web-1": b"ready", "web-2": b"py-1 said: load?\n", "web-3": b""}
    for name, answer in answers.items():
        member = await cluster.client(name)
        (await member.join("deploys")).on_message(lambda message, answer=answer: answer)
    acknowledged, answered, _ = await run(asking)
    assert acknowledged == "3 {}" and ast.literal_eval(answered) == answers
    assert shown_by_the_page(acknowledged) and shown_by_the_page(str(answers))
    lines = await run(agreeing)
    assert len(lines) == 6 and all(map(shown_by_the_page, lines))
    acknowledged, _ = await run(blocking)
    assert sorted(ast.literal_eval(acknowledged)) == sorted(answers)


async def test_the_few_lines_of_the_protocols_page_are_a_client(cluster):
    hub = await cluster.hub(listen=["tcp://127.0.0.1:0"])
    port = hub.addresses[0].rpartition(":")[2]
    member = await cluster.client("web-1", url=f"tcp://127.0.0.1:{port}")
    (await member.join("deploys")).on_message(lambda message: None)
    (program,) = PROGRAM.findall((DOCS / "protocol.md").read_text())
    assert await run(program.replace("8080", port)) == ["[['web-1'], {}, [], [], 0]"]
