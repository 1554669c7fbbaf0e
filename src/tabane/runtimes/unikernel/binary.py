"""What a WebAssembly file asks for and offers, read from its import and export sections. Pure.

Modules: WebAssembly Core Specification, 5.5; components: the component model's Binary.md. Only what
names things is read; that the rest is valid is the compiler's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from tabane.errors import UsageError
from tabane.model import Value

MODULE = b"\0asm\x01\0\0\0"
COMPONENT = b"\0asm\x0d\0\x01\0"
WASI = "wasi_snapshot_preview1"
HANDLER, RUN = "wasi:http/incoming-handler@", "wasi:cli/run@"
COMPONENT_IMPORTS = ("cli", "clocks", "filesystem", "http", "io", "random", "sockets")
"""The packages of WASI 0.2 that components may import. Of files and sockets they are given none."""

_IMPORTS, _EXPORTS = 2, 7
_COMPONENT_IMPORTS, _COMPONENT_EXPORTS = 10, 11
_FUNCTION, _TABLE, _MEMORY, _GLOBAL, _TAG = range(5)
_KINDS = ("function", "table", "memory", "global", "tag")
MOST_NAMES = 100_000


class Import(NamedTuple):
    """`module` is empty in a component, whose imports are interfaces."""

    module: str
    name: str
    kind: str


class Binary(Value, frozen=True):
    is_component: bool
    imports: tuple[Import, ...]
    exports: tuple[str, ...]

    @property
    def handles_http(self) -> bool:
        return any(name.startswith(HANDLER) for name in self.exports)


class _Reader:
    """Reads on, and raises `IndexError` at the end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    @property
    def more(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def take(self, size: int) -> memoryview:
        if self._at + size > len(self._data):
            raise IndexError
        self._at += size
        return self._data[self._at - size : self._at]

    def number(self) -> int:
        """Unsigned LEB128."""
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise IndexError

    def name(self) -> str:
        return bytes(self.take(self.number())).decode()

    def each(self) -> range:
        """The indexes of a vector."""
        count = self.number()
        if count > MOST_NAMES:
            raise IndexError
        return range(count)


def parse_binary(data: bytes) -> Binary:
    """Raises `UsageError` when it is neither a module nor a component, or broken off."""
    try:
        if data.startswith(MODULE):
            return _parse(data, False, {_IMPORTS: _read_imports, _EXPORTS: _read_exports})
        if data.startswith(COMPONENT):
            readers = {
                _COMPONENT_IMPORTS: _read_component_imports,
                _COMPONENT_EXPORTS: _read_component_exports,
            }
            return _parse(data, True, readers)
    except (IndexError, UnicodeDecodeError):
        raise UsageError("it is a broken WebAssembly file: build it again") from None
    raise UsageError("it is no WebAssembly module or component: build it for wasm32-wasi")


_Names = Iterator[Import | str]


def _parse(
    data: bytes, is_component: bool, readers: Mapping[int, Callable[[_Reader], _Names]]
) -> Binary:
    found: list[Import | str] = []
    reader = _Reader(data[len(MODULE) :])
    while reader.more:
        section, content = reader.byte(), reader.take(reader.number())
        if section in readers:
            found += readers[section](_Reader(content))
    imports = tuple(each for each in found if isinstance(each, Import))
    return Binary(is_component, imports, tuple(each for each in found if isinstance(each, str)))


def _read_imports(section: _Reader) -> _Names:
    for _ in section.each():
        module, name, kind = section.name(), section.name(), section.byte()
        if kind == _FUNCTION:
            section.number()
        elif kind == _TABLE:
            section.byte()
            _skip_limits(section)
        elif kind == _MEMORY:
            _skip_limits(section)
        elif kind in (_GLOBAL, _TAG):
            section.byte()
            section.number()
        else:
            raise IndexError
        yield Import(module, name, _KINDS[kind])


def _skip_limits(section: _Reader) -> None:
    has_most = section.byte() & 1
    section.number()
    if has_most:
        section.number()


def _read_exports(section: _Reader) -> _Names:
    for _ in section.each():
        name = section.name()
        section.byte()
        section.number()
        yield name


def _read_component_imports(section: _Reader) -> _Names:
    for _ in section.each():
        section.byte()
        yield Import("", section.name(), _skip_description(section))


def _read_component_exports(section: _Reader) -> _Names:
    for _ in section.each():
        section.byte()
        yield section.name()
        if section.byte() == 0:
            section.byte()
        section.number()
        if section.byte() == 1:
            _skip_description(section)


def _skip_description(section: _Reader) -> str:
    """Of an import or an ascribed export; its kind."""
    kind = section.byte()
    if kind == 0:
        section.byte()
    elif kind in (2, 3):
        bound = section.byte()
        if kind == 3 and bound == 1:
            return "type"
    section.number()
    return ("module", "function", "value", "type", "component", "instance")[kind]


def check_imports(binary: Binary, functions: frozenset[str]) -> None:
    """Raises `UsageError` with the first import that a host does not have. `functions` are what a
    module may import of WASI preview 1."""
    for each in binary.imports:
        if binary.is_component:
            namespace, _, rest = each.name.partition(":")
            if namespace != "wasi" or rest.partition("/")[0] not in COMPONENT_IMPORTS:
                raise UsageError(
                    f"it imports {each.name}, which no host here has: a component may import wasi: "
                    f"{', '.join(COMPONENT_IMPORTS)}"
                )
        elif (each.module, each.kind) != (WASI, "function") or each.name not in functions:
            raise UsageError(
                f"it imports {each.kind} {each.module}.{each.name}, which no host here has: a "
                f"module may import functions of {WASI} only"
            )


def check_entry(binary: Binary, *, serves: bool) -> None:
    """Raises `UsageError` when an app could not begin: `serves` where it has a port."""
    if not binary.is_component:
        if "_start" not in binary.exports:
            raise UsageError("it exports no _start: build it as a program, not as a library")
    elif serves and not binary.handles_http:
        raise UsageError(f"its app has a port, but it exports no {HANDLER}0.2")
    elif not serves and not any(name.startswith(RUN) for name in binary.exports):
        hint = ": give the app a port" if binary.handles_http else ""
        raise UsageError(f"its app has no port, and it exports no {RUN}0.2{hint}")
