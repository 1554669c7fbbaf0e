"""Manifests and streams: which bytes a checkpoint consists of, and what no manifest may say."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import Corrupt
from tabane.images.checkpoint.manifest import (
    HOLE,
    WINDOW_BYTES,
    About,
    File,
    Manifest,
    Stream,
    encode_manifest,
    is_inside,
    lay_out,
    make_manifest,
    parse_manifest,
    stream_of,
)
from tabane.model import AppName, Class

ABOUT = About(AppName("default/hello"), 3, "runc", Class.CONTAINER, ("sha256:" + "1" * 64,))
CHUNK = "c" * 64


def make(sizes: dict[str, int], holes: frozenset[int] = frozenset()) -> Manifest:
    stream = lay_out(sizes)
    chunks = (HOLE if window in holes else CHUNK for window in range(stream.windows))
    return make_manifest(ABOUT, 12.5, (), stream, chunks)


def test_small_files_share_a_window_and_large_ones_begin_with_one() -> None:
    stream = lay_out({"pages-1.img": 2 * WINDOW_BYTES + 1, "core-7.img": 100, "inventory.img": 50})
    assert [(file.path, file.offset) for file in stream.files] == [
        ("core-7.img", 0),
        ("inventory.img", 100),
        ("pages-1.img", WINDOW_BYTES),
    ]
    assert stream.windows == 4 and stream.window_size(0) == WINDOW_BYTES
    assert [*stream.pieces(0)] == [("core-7.img", 0, 0, 100), ("inventory.img", 0, 100, 50)]
    assert [*stream.pieces(2)] == [("pages-1.img", WINDOW_BYTES, 0, WINDOW_BYTES)]
    assert [*stream.pieces(3)] == [("pages-1.img", 2 * WINDOW_BYTES, 0, 1)]
    assert stream.window_size(3) == 1


@given(
    st.dictionaries(st.text("abc/", min_size=1, max_size=4), st.integers(0, 300), max_size=9),
    st.integers(1, 64),
)
def test_every_byte_of_every_file_is_in_one_window_once(
    sizes: dict[str, int], window_bytes: int
) -> None:
    stream = lay_out(sizes, window_bytes)
    seen: dict[str, list[int]] = {path: [] for path in sizes}
    for window in range(stream.windows):
        taken: list[int] = []
        for piece in stream.pieces(window):
            seen[piece.path] += range(piece.file_offset, piece.file_offset + piece.size)
            taken += range(piece.window_offset, piece.window_offset + piece.size)
        assert len({*taken}) == len(taken)
        assert all(0 <= at < stream.window_size(window) for at in taken)
    assert seen == {path: [*range(size)] for path, size in sizes.items()}


def test_a_manifest_comes_back_from_its_json_and_its_digest_is_of_all_of_it() -> None:
    manifest = make({"pages-1.img": 3 * WINDOW_BYTES, "a/b.img": 5}, frozenset({2}))
    digest, data = encode_manifest(manifest)
    assert parse_manifest(data) == manifest
    assert manifest.bytes == 3 * WINDOW_BYTES + 5
    assert manifest.memory_bytes == 3 * WINDOW_BYTES, "a window of three is a hole"
    other = msgspec.structs.replace(manifest, chunks=("d" * 64, *manifest.chunks[1:]))
    assert encode_manifest(other)[0] != digest
    assert [*stream_of(manifest).pieces(0)] == [("a/b.img", 0, 0, 5)]


GOOD = make({"pages-1.img": 2 * WINDOW_BYTES, "core.img": 10})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "has format 2, and 1 is known here"),
        ({"window_bytes": 0}, "has windows of 0 bytes"),
        ({"window_bytes": 1 << 40}, "has windows of 1099511627776 bytes"),
        ({"chunks": GOOD.chunks[:-1]}, "has 2 of 3 chunks"),
        ({"chunks": ("../../x", *GOOD.chunks[1:])}, "names a chunk by what is no digest"),
        ({"directories": ("../x",)}, "names '../x', which leads out of it"),
        ({"files": (File("/etc/passwd", 5, 0),)}, "names '/etc/passwd', which leads out of it"),
        ({"files": (File("a", 5, 0), File("b", 5, 3))}, "has files on top of each other"),
        ({"files": (File("a", 5, -3),)}, "has files on top of each other"),
        ({"files": (File("a", 5, 0), File("a", 5, 5))}, "has two files of one name"),
    ],
)
def test_what_no_manifest_may_say(changes: dict[str, object], problem: str) -> None:
    data = msgspec.json.encode(msgspec.structs.replace(GOOD, **changes))
    with pytest.raises(Corrupt) as caught:
        parse_manifest(data)
    assert problem in caught.value.message


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_no_manifest(data: bytes) -> None:
    with pytest.raises(Corrupt):
        parse_manifest(data)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_manifest_with_a_byte_changed_is_one_or_corrupt(at: int, value: int) -> None:
    data = bytearray(encode_manifest(GOOD)[1])
    data[at % len(data)] = value
    try:
        stream = stream_of(parse_manifest(bytes(data)))
    except Corrupt:
        return
    assert all(is_inside(file.path) for file in stream.files)


@pytest.mark.parametrize("path", ["", ".", "..", "/", "a/../b", "./a", "a//b", "a/", "/a", "a\0b"])
def test_paths_that_are_not_inside(path: str) -> None:
    assert not is_inside(path)


def test_an_empty_checkpoint() -> None:
    manifest = make({})
    assert (manifest.bytes, manifest.chunks, Stream(()).windows) == (0, (), 0)
    assert parse_manifest(encode_manifest(manifest)[1]) == manifest
