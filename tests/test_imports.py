"""The rules of the layout, checked on the source itself.

Imports point only upward: a part uses what stands before it in `LAYERS`, never what comes after.
Two kinds of modules stand elsewhere than their folder:

- a seam (`SEAMS`) holds only values and protocols, so it stands right after the values: parts that
  meet at a seam need not know each other;
- a program's entry (`ENTRIES`) puts parts together, so it stands with the tools, wherever it lies.

The tools come last: a demonstration may use the fakes of `tabane.testing`.
"""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"

LAYERS = (
    "errors",
    "reactions",
    "model",
    "units",
    "cron",
    "references",
    "commandline",
    "spec_readers",
    "spec_fields",
    "spec",
    "lifecycle",
    "clock",
    "supervise",
    "unix",
    "security",
    "middlecon",
    "k2i",
    "images",
    "guest",
    "runtimes",
    "network",
    "store",
    "scheduler",
    "gateway",
    "node",
    "api",
    "sim",
    "testing",
    "tools",
)
SEAMS = frozenset({"tabane.runtimes.api", "tabane.store.api", "tabane.gateway.api"})
ENTRIES = frozenset({"cli", "main", "__main__", "agentd", "gatewayd", "hubd"})

SANS_IO = (
    "tabane.model",
    "tabane.lifecycle",
    "tabane.middlecon.frames",
    "tabane.middlecon.session",
    "tabane.middlecon.rooms",
    "tabane.middlecon.chat",
    "tabane.k2i.orders",
    "tabane.guest.frames",
    "tabane.guest.orders",
    *(f"tabane.images.checkpoint.{name}" for name in ("manifest", "preflight")),
    "tabane.gateway.activation",
    "tabane.gateway.grants",
    *(f"tabane.scheduler.{name}" for name in ("health", "placement", "shares", "timers")),
    *(f"tabane.scheduler.{name}" for name in ("capacity", "fair_queue", "quotas")),
    *(f"tabane.tools.procfs.{name}" for name in ("calls", "numbers", "rewrite", "totals", "wire")),
)
IO_MODULES = (
    *("asyncio", "concurrent", "fcntl", "multiprocessing", "os", "select", "selectors", "socket"),
    *("ssl", "subprocess", "tempfile", "threading", "time", "uvloop"),
)

PRESENT_MOMENT = (
    *("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"),
    *("clock_gettime", "clock_gettime_ns", "localtime"),
)
OWN_TIME = ("tabane.clock", "tabane.node.holder")
"""The holder imports the standard library only: what it loads stays in memory for ever."""
TASK_STARTERS = frozenset({"create_task", "ensure_future", "TaskGroup", "run_coroutine_threadsafe"})
HEAVY = (
    *("cryptography", "fastapi", "google", "grpclib", "matplotlib", "pydantic", "rich"),
    *("starlette", "uvicorn", "wasmtime"),
)

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


PATHS = {module_name(path): path for path in sorted(SRC.rglob("*.py"))}


def imported_names(module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import, lazy ones included."""
    path = PATHS[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: 1 - node.level or None], *base.split(".")])
            for alias in node.names:
                yield node.lineno, f"{base.rstrip('.')}.{alias.name}"


def own_imports(module: str) -> Iterator[tuple[int, str]]:
    """Line and module of each import of one of our modules."""
    for line, name in imported_names(module):
        if name.partition(".")[0] == "tabane":
            yield line, name if name in PATHS else name.rpartition(".")[0]


def rank(module: str) -> int:
    """Where a module stands; a lower rank may not import a higher one."""
    if module == "tabane":
        return -1
    if module in SEAMS:
        return LAYERS.index("lifecycle")
    last = module.rpartition(".")[2]
    part = module.split(".")[1]
    return LAYERS.index("tools" if last in ENTRIES and part != "testing" else part)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def own_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its length without its docstring and without functions defined inside."""
    skipped: set[int] = set()
    inner = [node for node in ast.walk(function) if node is not function]
    for node in inner:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped.update(range(node.lineno, (node.end_lineno or 0) + 1))
    if ast.get_docstring(function, clean=False) is not None:
        first = function.body[0]
        skipped.update(range(first.lineno, (first.end_lineno or 0) + 1))
    return len(set(range(function.lineno, (function.end_lineno or 0) + 1)) - skipped)


def python_files() -> list[Path]:
    parts = (ROOT / part for part in ("src", "tests", "bench"))
    return sorted(path for part in parts for path in part.rglob("*.py"))


def shown(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_every_part_has_its_place() -> None:
    parts = {module.split(".")[1] for module in PATHS if "." in module}
    assert parts <= set(LAYERS), f"add to LAYERS: {sorted(parts - set(LAYERS))}"
    assert set(PATHS) >= SEAMS


def test_imports_point_only_upward() -> None:
    wrong = [
        f"{shown(PATHS[module], line)} imports {target}, which stands below it"
        for module in PATHS
        for line, target in own_imports(module)
        if rank(target) > rank(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_imported_modules_exist() -> None:
    wrong = [
        f"{shown(PATHS[module], line)} imports {target}, which is not there"
        for module in PATHS
        for line, target in own_imports(module)
        if target not in PATHS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", SANS_IO)
def test_decisions_and_codecs_have_no_io(module: str) -> None:
    seen: set[str] = set()
    waiting = [module]
    wrong: list[str] = []
    while waiting:
        current = waiting.pop()
        seen.add(current)
        wrong += [
            f"{shown(PATHS[current], line)} imports {name} (seen from {module})"
            for line, name in imported_names(current)
            if name.partition(".")[0] in IO_MODULES
        ]
        waiting += [target for _, target in own_imports(current) if target not in seen]
    assert not wrong, "\n".join(wrong)


def test_the_present_moment_comes_from_the_clock() -> None:
    wrong = []
    for module, path in PATHS.items():
        if module in OWN_TIME:
            continue
        wrong += [
            f"{shown(path, line)} takes {name}"
            for line, name in imported_names(module)
            if name.startswith("time.") and name[5:] in PRESENT_MOMENT
        ]
        for node in ast.walk(parse(path)):
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            owner, name = node.value.id, node.attr
            if (owner == "time" and name in PRESENT_MOMENT) or (
                owner in ("datetime", "date") and name in ("now", "utcnow", "today")
            ):
                wrong.append(f"{shown(path, node.lineno)} takes {owner}.{name}")
    assert not wrong, "take the time from tabane.clock:\n" + "\n".join(wrong)


def test_only_the_supervisor_starts_tasks() -> None:
    wrong = [
        f"{shown(path, node.lineno)} uses {node.attr}"
        for module, path in PATHS.items()
        if not may_start_tasks(module)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr in TASK_STARTERS
    ]
    wrong += [
        f"{shown(PATHS[module], line)} imports {name}"
        for module in PATHS
        for line, name in imported_names(module)
        if not may_start_tasks(module) and name.rpartition(".")[2] in TASK_STARTERS
    ]
    assert not wrong, "start tasks through tabane.supervise.Supervisor:\n" + "\n".join(wrong)


def may_start_tasks(module: str) -> bool:
    """The conformance suites are tests: the guard against leaks watches their tasks."""
    return module == "tabane.supervise" or module.startswith("tabane.testing.")


def test_packages_export_what_they_import() -> None:
    wrong = []
    for module, path in PATHS.items():
        if path.name != "__init__.py" or not own_exports(path):
            continue
        package = importlib.import_module(module)
        wrong += [
            f"{module}.__all__ names {name}, which is not there"
            for name in package.__all__
            if not hasattr(package, name)
        ]
        wrong += [
            f"{module} imports {name} and does not export it"
            for name in sorted(own_exports(path) - set(package.__all__))
        ]
    assert not wrong, "\n".join(wrong)


def own_exports(path: Path) -> set[str]:
    """The public names an `__init__` takes from our modules or lists in `__all__`."""
    names: set[str] = set()
    for node in parse(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tabane"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names |= set(ast.literal_eval(node.value))
    return {name for name in names if not name.startswith("_")}


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in python_files()}
    wrong = [
        f"{path.relative_to(ROOT)} has {lines} lines"
        for path, lines in lengths.items()
        if lines > MAX_FILE_LINES
    ]
    assert not wrong, f"more than {MAX_FILE_LINES} lines:\n" + "\n".join(wrong)


def test_functions_are_short() -> None:
    wrong = [
        f"{shown(path, function.lineno)} {function.name} has {own_lines(function)} lines"
        for path in python_files()
        for function in functions(parse(path))
        if own_lines(function) > MAX_FUNCTION_LINES
    ]
    assert not wrong, f"more than {MAX_FUNCTION_LINES} lines:\n" + "\n".join(wrong)


def test_the_command_starts_light() -> None:
    program = (
        "import json, sys\nimport tabane.tools.cli\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(done.stdout) == [], "import these inside the functions that need them"
