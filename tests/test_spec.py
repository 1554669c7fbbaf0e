import json
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tabane.errors import SpecError
from tabane.model import (
    App,
    Class,
    Collect,
    NetworkPolicy,
    Placement,
    Reactive,
    Resources,
    SecurityPolicy,
    Services,
)
from tabane.node.messages import NODES
from tabane.spec import load_app, parse_app, read_app, render_app
from tabane.spec_fields import CAPABILITIES, FIELDS, OWN_ROOM

FULL = """\
name = "hello"
namespace = "shop"
image = "rootfs:./rootfs"            # or oci:DIR
command = ["httpd", "-f", "-p", "8000"]
class = "container"
driver = "crun"
allow_emulation = true
port = 8000
hosts = ["hello.test", "WWW.Hello.test"]
workdir = "/srv"

[env]
LANG = "C.UTF-8"

[resources]
cpu = 0.5
memory = "64MiB"
pids = 64
disk = 104857600

[reactive]
concurrency = 10
min = 0
max = 20
stop_after = "30s"
max_age = "1h30m"
ready = "http:/healthz"
start_timeout = "10s"
response_timeout = "60s"
stop_timeout = "250ms"
queue = 1000

[network]
egress = false

[placement]
datacenters = ["tokyo", "osaka"]

[security]
capabilities = ["CAP_NET_RAW"]

[services]
middlecon = ["deploys", "chat.*"]
k2i = true

[[collect]]
kind = "nginx"
url = "http://127.0.0.1:8000/status"

[[collect]]
kind = "command"
name = "queue"
command = ["queue-length", "--json"]
interval = "1m"
deadline = "5s"
"""

LEAST = 'name = "a"\nimage = "host"\ncommand = ["true"]\n'
SAVED = "port = 1\n[reactive]\ncheckpoint = true\n"
RESTS = LEAST + "port = 1\n[reactive]\nfreeze_after = "


def refusal(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_app(text, file="a.toml")
    return caught.value


def test_every_field() -> None:
    assert parse_app(FULL) == App(
        name="hello",
        namespace="shop",
        image="rootfs:./rootfs",
        source="rootfs:./rootfs",
        command=("httpd", "-f", "-p", "8000"),
        isolation=Class.CONTAINER,
        driver="crun",
        allow_emulation=True,
        port=8000,
        hosts=("hello.test", "www.hello.test"),
        workdir="/srv",
        env={"LANG": "C.UTF-8"},
        resources=Resources(0.5, 64 << 20, 64, 100 << 20),
        reactive=Reactive(10, 0, 20, 30.0, 5400.0, "http:/healthz", 10.0, 60.0, 0.25, 1000),
        network=NetworkPolicy(egress=False),
        placement=Placement(("tokyo", "osaka")),
        security=SecurityPolicy(("CAP_NET_RAW",)),
        services=Services(("deploys", "chat.*"), k2i=True),
        collect=(
            Collect("nginx", url="http://127.0.0.1:8000/status"),
            Collect(
                "command", "queue", command=("queue-length", "--json"), interval_s=60, deadline_s=5
            ),
        ),
    )


def test_defaults() -> None:
    app = parse_app('name = "a"\nimage = "oci:dir"\nport = 80')
    assert app == App(name="a", image="oci:dir", source="oci:dir", port=80)
    assert app.isolation is Class.CONTAINER


def test_the_room_no_app_may_enter_is_that_of_the_agents() -> None:
    assert OWN_ROOM == NODES


def test_without_a_port_it_is_ready_when_it_runs() -> None:
    assert parse_app(LEAST).reactive.ready == "started"
    assert parse_app(LEAST + "port = 1").reactive.ready == "listen"
    assert parse_app(LEAST + 'port = 1\n[reactive]\nready = "started"').reactive.ready == "started"


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ('kind = "weather"', "kind", "'weather' is none of command, nginx, redis"),
        ('kind = "ngin"', "kind", "did you mean nginx?"),
        ('url = "http://127.0.0.1/"', "kind", "is missing"),
        ('kind = "nginx"', "url", "is missing: nginx is asked there"),
        (
            'kind = "nginx"\nurl = "http://10.0.0.1/"',
            "url",
            "its own instance: the host is 127.0.0.1",
        ),
        ('kind = "nginx"\nurl = "http://hello.tabane/"', "url", "the host is 127.0.0.1"),
        ('kind = "nginx"\nurl = "http://0.0.0.0/"', "url", "the host is 127.0.0.1"),
        ('kind = "redis"\nurl = "unix:///run/redis.sock"', "url", "the host is 127.0.0.1"),
        (
            'kind = "redis"\nurl = "redis://127.0.0.1"\npassword_file = "/x"',
            "password_file",
            "no such",
        ),
        ('kind = "command"\ncommand = []', "command", "is not a list of at least one"),
    ],
)
def test_a_mistake_in_a_collector_is_named(text: str, field: str, problem: str) -> None:
    before = '[[collect]]\nkind = "command"\nname = "a"\ncommand = ["b"]\n'
    error = refusal(f"{LEAST}{before}[[collect]]\n{text}\n")
    assert error.field == f"collect[2].{field}"
    assert problem in error.problem
    assert error.line >= 8


@pytest.mark.parametrize(
    ("told", "deadline_s"),
    [("", 2.0), ('interval = "1s"', 1.0), ('interval = "5s"', 2.0), ('deadline = "500ms"', 0.5)],
)
def test_a_reading_takes_no_longer_than_the_interval(told: str, deadline_s: float) -> None:
    text = f'{LEAST}[[collect]]\nkind = "command"\ncommand = ["b"]\n{told}\n'
    assert parse_app(text).collect[0].deadline_s == deadline_s


def test_more_collectors_than_there_may_be() -> None:
    each = '[[collect]]\nname = "c%d"\nkind = "command"\ncommand = ["b"]\n'
    text = LEAST + "".join(each % number for number in range(9))
    assert refusal(text).problem == "there are 9, 8 are the most"


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        ('name = "Hello"', "name", "'Hello' is no name: 1 to 63 of a-z, 0-9 and -"),
        ('name = "-a"', "name", "is no name"),
        ('name = "' + "a" * 64 + '"', "name", "is no name"),
        ("name = 5", "name", "5 is not text: write it in quotes"),
        ('name = "a\\n"', "name", "is no name"),
        ('image = "docker://nginx"', "image", "write docker://HOST/REPOSITORY:TAG"),
        ('image = "docker://library/nginx"', "image", "does not say which registry"),
        ('image = "nginx"', "image", "is none of docker://HOST/REPOSITORY:TAG, rootfs:DIR"),
        ('image = "wasm:"', "image", "archive:FILE, wasm:FILE, solo5:FILE, host"),
        ('image = "rootfs:"', "image", "is none of"),
        ('image = "oci:a\\u0000b"', "image", "without NUL"),
        ('command = "httpd -f"', "command", "is not a list of at least one: write it as"),
        ("command = []", "command", "is not a list of at least one"),
        ('command = [""]', "command", "its first word, the program, is empty"),
        ('command = ["a", 1]', "command", "1 is not text"),
        ('class = "jail"', "class", "is none of container, sandbox, unikernel, microvm, vm"),
        ('class = ["vm"]', "class", "is none of"),
        ("port = 0", "port", "0 is not a whole number from 1 to 65535"),
        ("port = true", "port", "True is not a whole number"),
        ('port = "80"', "port", "'80' is not a whole number"),
        ("port = 80.0", "port", "80.0 is not a whole number"),
        ('hosts = ["a b"]', "hosts", "'a b' is no DNS name"),
        ('hosts = ["*.a"]', "hosts", "is no DNS name"),
        ('hosts = ["127.0.0.1"]', "hosts", "is no DNS name"),
        ('hosts = ["a.b."]', "hosts", "is no DNS name"),
        ('hosts = ["束.jp"]', "hosts", "other scripts as xn--"),
        ('hosts = ["a.b", "A.B"]', "hosts", "'a.b' is there twice"),
        ('hosts = "a.b"', "hosts", "is not a list"),
        ('workdir = "srv"', "workdir", "is not an absolute path"),
        ('env = "A=1"', "env", "is not a table: write [env]"),
        ("env = {A = 1}", "env.A", "1 is not text"),
        ('env = {"A=B" = ""}', "env", "is no name of a variable"),
        ("resources = 3", "resources", "3 is not a table: write [resources], fields below"),
        ("resources.cpu = 0", "resources.cpu", "0 is not a number of CPUs from 0.01 to 4096"),
        ("resources.cpu = nan", "resources.cpu", "nan is not a number"),
        ('resources.memory = "64"', "resources.memory", "is no size"),
        ('resources.memory = "64mib"', "resources.memory", 'kB, MB, ..., as "64MiB"'),
        ('resources.memory = "6kB"', "resources.memory", "is not from 1MiB to 1024TiB"),
        ("resources.memory = 1.5", "resources.memory", "1.5 is not text"),
        ("resources.pids = 0", "resources.pids", "from 1 to 4194304"),
        ("reactive.concurrency = 0", "reactive.concurrency", "from 1 to 1000000"),
        ("reactive.stop_after = 30", "reactive.stop_after", "30 has no unit: write a duration as"),
        ('reactive.stop_after = "30"', "reactive.stop_after", "is no duration"),
        ('reactive.stop_after = ""', "reactive.stop_after", "is no duration"),
        ('reactive.stop_after = "30m1h"', "reactive.stop_after", "with d, h, m, s or ms"),
        ('reactive.max_age = "0s"', "reactive.max_age", "is not longer than nothing"),
        ('reactive.max_age = "40000d"', "reactive.max_age", "at most 100 years"),
        ('reactive.ready = "http:healthz"', "reactive.ready", '"http:/path"'),
        ('reactive.ready = "http:/a b"', "reactive.ready", "is none of"),
        ('protocol = "h2"', "protocol", 'is none of "http", "h2c"'),
        ("network.egress = 1", "network.egress", "1 is neither true nor false"),
        ("placement.datacenters = []", "placement.datacenters", "list of at least one"),
        ('placement.datacenters = ["a/b"]', "placement.datacenters", "is no name"),
        ('security.capabilities = ["NET_RAW"]', "security.capabilities", "CAP_NET_RAW?"),
        ('security.capabilities = ["cap_net_raw"]', "security.capabilities", "CAP_NET_RAW?"),
        ("services.middlecon = []", "services.middlecon", "list of at least one"),
        ('services.middlecon = "deploys"', "services.middlecon", "is not a list"),
        ('services.middlecon = ["a*b"]', "services.middlecon", 'no * but at the end, as "chat.*"'),
        ('services.middlecon = [""]', "services.middlecon", "'' is no room: 1 to 255 bytes"),
        ('services.middlecon = ["a\\u0007"]', "services.middlecon", "that can be printed"),
        ('services.middlecon = ["' + 128 * "束" + '"]', "services.middlecon", "1 to 255 bytes"),
        ('services.middlecon = ["a", "a"]', "services.middlecon", "'a' is there twice"),
        ('services.middlecon = ["nodes"]', "services.middlecon", "the cluster's own processes"),
        ('services.middlecon = ["no*"]', "services.middlecon", "only rooms of the app's own"),
        ('services.middlecon = ["*"]', "services.middlecon", "'*' takes in 'nodes'"),
        ("services.k2i = 1", "services.k2i", "1 is neither true nor false"),
        ("services.k2 = true", "services.k2", "did you mean k2i? (allowed here: middlecon, k2i"),
        ("prot = 80", "prot", "did you mean port? (allowed here: name, namespace, image"),
        ("reactive.stopafter = 1", "reactive.stopafter", "did you mean stop_after? (allowed here:"),
        ("resources.xyzzy = 1", "resources.xyzzy", "(allowed here: cpu, memory, pids, disk, cpu"),
        ('"a\\u001b[2Jb" = 1', "'a\\x1b[2Jb'", "there is no such field"),
    ],
)
def test_a_mistake_is_named(line: str, field: str, problem: str) -> None:
    key = line.partition("=")[0].strip()
    rest = "".join(f"{kept}\n" for kept in LEAST.splitlines() if not kept.startswith(f"{key} ="))
    error = refusal(f"{rest}{line}\n")
    assert (error.file, error.field) == ("a.toml", field)
    assert problem in error.problem
    if "\\" not in line:
        assert error.line == rest.count("\n") + 1
        assert str(error) == f"a.toml:{error.line}: {field}: {error.problem}"
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ('image = "host"', "name", "is missing: every app has one"),
        ('name = "a"', "image", "is missing"),
        ('name = "a"\nimage = "host"', "command", "is missing: the image 'host' brings none"),
        ('name = "a"\nimage = "rootfs:r"', "command", "'rootfs:r' brings none"),
        (LEAST + "[reactive]\nmin = 11", "reactive.min", "11 is more than max, 10"),
        (LEAST + 'hosts = ["a.b"]', "port", "is missing: hosts lead to one"),
        (LEAST + '[reactive]\nready = "listen"', "port", 'ready = "listen" needs one'),
        (LEAST + '[reactive]\nready = "http:/"', "port", 'only "started" does not'),
        (
            LEAST + 'port = 1\nprotocol = "h2c"\n[reactive]\nready = "http:/"',
            "reactive.ready",
            'protocol is "h2c"',
        ),
        (LEAST + '[reactive]\nfreeze_after = "1s"', "reactive.freeze_after", "needs a port"),
        (RESTS + '"30s"', "reactive.freeze_after", "30 s is not before stop_after, 30 s"),
        (
            RESTS + '"5s"\ncheckpoint_after = "5s"',
            "reactive.freeze_after",
            "5 s is not before checkpoint_after, 5 s: lower it or raise that",
        ),
        (
            RESTS + '"5s"\ncheckpoint_after = "31s"',
            "reactive.checkpoint_after",
            "31 s is not before stop_after, 30 s",
        ),
        (LEAST + "[reactive]\nreclaim = true", "reactive.reclaim", "with freeze_after only"),
        (LEAST + "[reactive]\ncheckpoint = true", "reactive.checkpoint", "needs a port"),
        (
            LEAST + SAVED + '[[volumes]]\nname = "a"\npath = "/a"',
            "reactive.checkpoint",
            "is not possible with volumes",
        ),
        (
            LEAST + 'port = 1\n[hooks]\nrestored = "http:/a"',
            "hooks.restored",
            "reactive.checkpoint = true or reactive.checkpoint_after only",
        ),
        (
            LEAST + 'protocol = "h2c"\n' + SAVED + '[hooks]\nrestored = "http:/a"',
            "hooks.restored",
            "in HTTP/1.1, which it does not speak",
        ),
        (LEAST + '[hooks]\nrestored = "http:a"', "hooks.restored", "neither"),
        (LEAST + '[hooks]\nrestored = "signal:KILL"', "hooks.restored", "HUP, USR1, USR2, WINCH"),
    ],
)
def test_fields_fit_together(text: str, field: str, problem: str) -> None:
    error = refusal(text)
    assert error.field == field
    assert problem in error.problem


def test_the_line_is_that_of_the_field() -> None:
    for number, line in enumerate(FULL.splitlines(), 1):
        key = line.partition(" =")[0]
        if key == line or key in ("LANG", "name", "image", "command"):
            continue
        lines = FULL.splitlines()
        lines[number - 1] = f"{key} = [[1]]"
        assert refusal("\n".join(lines)).line == number, key


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"port" = 0', 4),
        ("\n\n'port'=0", 6),
        ("resources = {cpu = 1, pids = 0}", 4),
        ("[ resources ]\n\tpids=0", 5),
        ("[resources]\n# pids = 1\n[env]\npids = '1'\n[reactive]\nmin=-1", 9),
        ('hosts = [\n "a.b",\n "*",\n]', 4),
    ],
)
def test_lines_in_other_spellings(text: str, line: int) -> None:
    assert refusal(LEAST + text).line == line


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('name = "a"\nport = = 1', 2, "this is not TOML: Invalid value"),
        ("name = 'a'\nname = 'b'", 2, "this is not TOML: Cannot overwrite a value"),
        ('\nname = "a', 2, "this is not TOML: Unterminated string"),
        ("x = " + "[" * 100_000, 0, "nested too deeply"),
        ("x = " + "9" * 5_000, 0, "this is not TOML"),
        ("#" * (2 << 20), 0, "longer than an app file may be"),
    ],
)
def test_what_is_not_toml(text: str, line: int, problem: str) -> None:
    error = refusal(text)
    assert problem in error.problem
    assert (error.line, error.field) == (line, "")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no\.toml: cannot be read: No such file"):
        load_app(tmp_path / "no.toml")
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
        load_app(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "a"\nhosts = ["caf\xe9"]')
    with pytest.raises(SpecError, match=r"latin\.toml:2: is not UTF-8"):
        load_app(tmp_path / "latin.toml")
    (tmp_path / "a.toml").write_text(FULL)
    assert load_app(tmp_path / "a.toml") == parse_app(FULL)


def names() -> set[str]:
    sections = [field.fields for field in FIELDS.values() if hasattr(field, "fields")]
    return set(FIELDS).union(*sections)


LABELS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
SECONDS = st.floats(1e-4, 1e8) | st.integers(1, 10**7).map(float)
SIZES = st.integers(1 << 20, 1 << 50) | st.integers(1, 1 << 20).map(lambda mib: mib << 20)


@st.composite
def apps(draw: st.DrawFn) -> App:
    least = draw(st.integers(0, 100))
    port = draw(st.none() | st.integers(1, 65535))
    image = draw(st.sampled_from(["host", "rootfs:./r", "oci:dir", "archive:/f.tar"]))
    ready = ["started"] if port is None else ["started", "listen", "http:/healthz?a=b"]
    host = LABELS.map(lambda label: f"{label}.test")
    isolation = draw(st.sampled_from(Class))
    budget = draw(st.none() | SECONDS) if isolation is Class.AUTO else None
    rests = draw(st.sampled_from([None, 0.0, 1.5])) if port else None
    return App(
        name=draw(LABELS),
        namespace=draw(LABELS),
        image=image,
        source=image,
        command=("run", *draw(st.lists(TEXT))),
        isolation=isolation,
        driver=draw(st.just("") | LABELS) if isolation is not Class.AUTO else "",
        port=port,
        hosts=tuple(draw(st.lists(host, unique=True))) if port else (),
        env=draw(st.dictionaries(LABELS, TEXT)),
        workdir=draw(st.sampled_from(["", "/", "/srv/a b"])),
        resources=Resources(draw(st.floats(0.01, 64)), draw(SIZES), 7, draw(SIZES)),
        reactive=Reactive(
            concurrency=draw(st.integers(1, 10**6)),
            min=least,
            max=draw(st.integers(max(least, 1), 1000)),
            stop_after_s=draw(st.just(0.0) | SECONDS) if rests is None else 10.0,
            freeze_after_s=rests,
            checkpoint_after_s=draw(st.sampled_from([None, 9.5])) if rests is not None else None,
            reclaim=draw(st.booleans()) if rests is not None else False,
            max_age_s=draw(st.none() | SECONDS),
            ready=draw(st.sampled_from(ready)),
            start_timeout_s=draw(SECONDS),
            wake_budget_s=budget,
        ),
        network=NetworkPolicy(draw(st.booleans())),
        placement=Placement(draw(st.just(("*",)) | st.tuples(LABELS))),
        security=SecurityPolicy(draw(st.sampled_from([(), ("CAP_NET_RAW", "CAP_CHOWN")]))),
        services=Services(
            draw(st.sampled_from([(), ("deploys", "chat.*", "束")])), draw(st.booleans())
        ),
        collect=draw(
            st.sampled_from([(), (Collect("redis", "r", "redis://localhost", interval_s=2.5),)])
        ),
    )


@given(apps())
def test_what_is_shown_reads_as_the_same_app(app: App) -> None:
    document = json.loads(json.dumps(render_app(app)))
    assert read_app(document) == app


@given(st.text() | st.text(string.printable + "\n\"'[]={}"))
def test_any_text_is_an_app_or_a_spec_error(text: str) -> None:
    try:
        assert isinstance(parse_app(text), App)
    except SpecError as error:
        assert error.line <= text.count("\n") + 1


SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["host", "rootfs:a", "listen", "1h", "64MiB", "*", "vm", "a"])
)
KEYS = st.sampled_from(sorted(names())) | st.text(max_size=10)
DOCUMENTS = st.dictionaries(
    KEYS,
    st.recursive(
        SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=10
    ),
)


@given(DOCUMENTS)
def test_any_structure_is_an_app_or_a_spec_error(document: dict[str, Any]) -> None:
    good = tomllib.loads(FULL)
    for candidate in (document, good | document):
        try:
            assert isinstance(read_app(candidate), App)
        except SpecError as error:
            assert error.field


def test_capabilities_are_the_kernels() -> None:
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert len(CAPABILITIES) >= last + 1
