"""App files that declare containers beside the main one."""

from __future__ import annotations

import json

import pytest

from tabane.errors import SpecError
from tabane.spec import parse_app, read_app, render_app

LEAST = 'name = "a"\nimage = "host"\ncommand = ["true"]\n'


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_app(text, file="a.toml")
    return caught.value


def test_containers_beside_the_main_one() -> None:
    text = """
        name = "web"
        image = "oci:./web"
        command = ["serve"]
        port = 80

        [[volumes]]
        name = "data"
        path = "/data"

        [[containers]]
        name = "cache"
        image = "rootfs:./cache"
        command = ["cache", "-v"]
        workdir = "/srv"
        env = {A = "1"}
        volumes = ["data"]

        [[containers]]
        name = "same"
        """
    app = parse_app(text)
    cache, same = app.containers
    assert (cache.image, cache.source) == ("rootfs:./cache", "rootfs:./cache")
    assert (same.image, same.source) == ("oci:./web", "")
    assert app.images() == (("oci:./web",) * 2, ("rootfs:./cache",) * 2, ("oci:./web",) * 2)
    assert app.needs() == ("volumes", "pods")
    assert read_app(json.loads(json.dumps(render_app(app)))) == app
    beside = app.beside(cache)
    assert (beside.key, beside.port, beside.command) == ("default/web.cache", None, cache.command)
    assert beside.volumes == app.volumes and not app.beside(same).volumes
    assert not app.beside(same).command and not beside.containers


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ('command = ["b"]', "name", "is missing"),
        ('name = "a"\ncommand = ["b"]', "name", "another one is called 'a'"),
        ('name = "main"\ncommand = ["b"]', "name", "is what the app's own program is called"),
        ('name = "B"\ncommand = ["b"]', "name", "is no name"),
        ('name = "b"', "command", "is missing: the image 'host' brings none"),
        ('name = "b"\nimage = "rootfs:b"', "command", "the image 'rootfs:b' brings none"),
        ('name = "b"\nimage = "b"\ncommand = ["b"]', "image", "is none of"),
        ('name = "b"\ncommand = ["b"]\nport = 1', "port", "there is no such field"),
        ('name = "b"\ncommand = ["b"]\nenv = {X = 1}', "env.X", "1 is not text"),
        ('name = "b"\ncommand = ["b"]\nvolumes = ["d"]', "volumes", "no volume of the app"),
    ],
)
def test_a_mistake_in_a_container_is_named(text: str, field: str, problem: str) -> None:
    before = '[[containers]]\nname = "a"\ncommand = ["b"]\n'
    error = refusal(f"{LEAST}{before}[[containers]]\n{text}\n")
    assert error.field == f"containers[2].{field}"
    assert problem in error.problem
    assert error.line >= 7
