"""Names of images in registries."""

from __future__ import annotations

import pytest

from tabane.errors import UsageError
from tabane.references import Reference, parse_reference

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("docker://r.example/library/nginx", Reference("r.example", "library/nginx")),
        ("docker://R.test/a/b:1.2", Reference("R.test", "a/b", "1.2")),
        ("docker://localhost/a:x_1-2.3", Reference("localhost", "a", "x_1-2.3")),
        (
            "docker://127.0.0.1:5000/a/b/c-d__e.f:1",
            Reference("127.0.0.1:5000", "a/b/c-d__e.f", "1"),
        ),
        (f"docker://[::1]:5000/a@{DIGEST}", Reference("[::1]:5000", "a", digest=DIGEST)),
        (f"docker://r.test/a:1@{DIGEST}", Reference("r.test", "a", "1", DIGEST)),
    ],
)
def test_names(text: str, reference: Reference) -> None:
    assert parse_reference(text) == reference
    assert parse_reference(str(reference)).digest == reference.digest


def test_what_a_name_says() -> None:
    named = parse_reference("docker://r.test:5000/team/app:1")
    assert str(named) == "docker://r.test:5000/team/app:1"
    assert str(named.at(DIGEST)) == f"docker://r.test:5000/team/app@{DIGEST}"
    assert str(parse_reference("docker://r.test/app")) == "docker://r.test/app:latest"


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1:5000", True),
        ("127.1.2.3", True),
        ("localhost", True),
        ("[::1]:5000", True),
        ("10.0.0.1:5000", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
    ],
)
def test_registries_on_this_machine(host: str, is_local: bool) -> None:
    assert parse_reference(f"docker://{host}/a").is_local is is_local


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("docker://nginx", "write docker://HOST/REPOSITORY:TAG"),
        ("docker://library/nginx", "does not say which registry: .* a port, which library has not"),
        ("docker://r.test", "is no image of a registry"),
        ("docker://r.test/", "is no image of a registry"),
        ("docker://r.test/Upper", "is no image of a registry"),
        ("docker://r.test/a//b", "is no image of a registry"),
        ("docker://r.test/../b", "is no image of a registry"),
        ("docker://-r.test/a", "is no image of a registry"),
        ("docker://user:word@r.test/a", "is no image of a registry"),
        ("docker://r.test/a b", "is no image of a registry"),
        ("docker://r.test/" + "a" * 300, "is no image of a registry"),
        ("docker:r.test/a", "is no image of a registry"),
        ("docker://r.test/a:", "is no tag"),
        ("docker://r.test/a:-1", "is no tag"),
        ("docker://r.test/a:" + "1" * 129, "is no tag"),
        ("docker://r.test/a@sha256:12", "is no digest: sha256: and 64 hex digits"),
        ("docker://r.test/a@", "is no digest"),
        ("docker://r.test/a\n", "is no image of a registry"),
        ("", "is no image of a registry"),
    ],
)
def test_what_is_no_name(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_reference(text)
