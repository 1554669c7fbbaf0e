"""The k2i program as its users run it."""

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tabane import __version__
from tabane.k2i import Client, cli

K2I = str(Path(sys.executable).with_name("k2i"))


class Service:
    def __init__(self, process: subprocess.Popen[str], host: str, port: int) -> None:
        self.process = process
        self.host = host
        self.port = port

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, body

    def get(self, path: str) -> Any:
        status, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)


def serve(*arguments: str, program: Sequence[str] = (K2I,)) -> Iterator[Service]:
    command = [*program, "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        line = process.stdout.readline()
        host, _, port = line.removeprefix("On ").rpartition(":")
        try:
            yield Service(process, host.strip("[]"), int(port))
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    yield from serve()


def test_the_way_from_the_root(service: Service) -> None:
    for path in service.get("/").values():
        assert service.ask(path)[0] == 200


def test_without_options_it_is_where_it_was_in_2018() -> None:
    with subprocess.Popen([K2I], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "On 127.0.0.1:8000\n"
        status, _ = Service(process, "127.0.0.1", 8000).ask("/v1/proc")
        assert status == 200
        process.terminate()


def test_a_socket_in_a_deep_directory(tmp_path: Path) -> None:
    """The kernel takes 108 bytes of a path."""
    path = tmp_path / ("d" * 100) / ("e" * 100) / "k2i.sock"
    path.parent.mkdir(parents=True)
    command = [K2I, "--unix", str(path)]
    for _ in range(2):  # the second finds the socket of one that was killed
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            assert process.stdout.readline() == f"On {path}\n"
            assert Client(f"unix://{path}").processes(pid=process.pid)[0].name == "k2i"
            process.kill()


def test_the_version() -> None:
    for option in ("-V", "--version"):
        done = subprocess.run([K2I, option], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"k2i {__version__}\n", "")


def test_the_pages_of_2018(service: Service) -> None:
    assert service.ask("/v1/") == (200, b"root response!")
    assert service.ask("/v1/hello") == (200, b"hello!")
    config = {"hostname": "127.0.0.1", "port": service.port, "threads": 1}
    assert service.get("/v1/config") == config


def test_processes(service: Service) -> None:
    pid = service.process.pid
    everything = service.get("/v1/proc")
    assert pid in [record["tid"] for record in everything]
    assert len(everything) > 1
    for path in (f"/v1/proc/pid/{pid}", f"/v1/proc/{pid}", "/v1/proc/self", "/v1/k2i"):
        (record,) = service.get(path)
        assert record["tid"] == pid
        assert len(record) == 84
    assert pid in [record["tid"] for record in service.get("/v1/proc/cmd/k2")]
    assert pid not in [record["tid"] for record in service.get("/v1/proc/cmd/K2")]


@pytest.mark.parametrize(
    "path", ["pid/4194305", "4194305", "pid/-1", "cmd/no%20such", "pid/9999999999"]
)
def test_what_is_not_there_is_an_empty_array(service: Service, path: str) -> None:
    assert service.ask(f"/v1/proc/{path}") == (200, b"[]")


@pytest.mark.parametrize("pid", ["x", "1x", "1.0", "%D9%A3", "--1", "%20", "9" * 400])
def test_a_pid_is_a_number(service: Service, pid: str) -> None:
    for path in (f"/v1/proc/pid/{pid}", f"/v1/proc/{pid}"):
        status, body = service.ask(path)
        assert status == 400
        assert json.loads(body)["message"].startswith("a pid is a number, not ")


def test_names_are_text_in_json(service: Service) -> None:
    naming = r"open('/proc/self/comm', 'wb').write(b'\xff\n)')"
    program = f"import sys\n{naming}\nprint(flush=True)\nsys.stdin.read()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline()
        (record,) = service.get(f"/v1/proc/{child.pid}")
        assert record["cmd"] == "\\xff\n)"
        assert service.get("/v1/proc/cmd/%5Cxff%0A)")[0]["tid"] == child.pid
        child.kill()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/proc", "/v1/", "/nowhere", "/openapi.json"])
def test_foreign_hosts_and_origins_are_refused(
    service: Service, path: str, headers: dict[str, str]
) -> None:
    status, body = service.ask(path, **headers)
    assert status == 403
    assert json.loads(body)["error"] == "denied"


def test_own_origins_are_served(service: Service) -> None:
    own = f"http://localhost:{service.port}"
    assert service.ask("/v1/hello", Host=f"localhost:{service.port}", Origin=own)[0] == 200


def test_only_reading(service: Service) -> None:
    for method in ("POST", "PUT", "DELETE"):
        assert service.ask("/v1/proc", method)[0] == 405


def test_ipv6() -> None:
    for service in serve("--host", "::1"):
        assert service.host == "::1"
        assert service.get("/v1/config")["hostname"] == "::1"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly(end: signal.Signals) -> None:
    with subprocess.Popen(
        [K2I, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.readline()
        process.send_signal(end)
        _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--port", "x"], "k2i: --port: 'x' is no whole number\n"),
        (["--port", "70000"], "k2i: --port: 70000 is not from 0 to 65535\n"),
        (["--host", "0.0.0.0"], "k2i: --host: '0.0.0.0' is none of 127.0.0.1, ::1"),
        (["--prot", "1"], "k2i: there is no option --prot: did you mean --port?\n"),
        (["extra"], "k2i: there are more words than `k2i` takes\n"),
    ],
)
def test_wrong_arguments(arguments: list[str], sentence: str) -> None:
    done = subprocess.run([K2I, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(sentence)
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken(service: Service) -> None:
    done = subprocess.run([K2I, "--port", str(service.port)], capture_output=True, text=True)
    assert done.returncode == 1
    place = f"127.0.0.1:{service.port}"
    assert done.stderr == f"k2i: cannot listen on {place}: Address already in use\n"


def test_who_takes_nothing_of_an_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "UNREAD_MS", 50)
    with (
        cli.listen_tcp("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        answering, _ = listener.accept()
        with answering, pytest.raises(TimeoutError):
            answering.sendall(b"x" * (64 << 20))


async def test_a_mistake_of_its_own_is_json_too() -> None:
    class Broken:
        table = None

        async def answer(self, *_: object) -> bytes:
            raise ZeroDivisionError

    app = cli.build_app(Broken(), "127.0.0.1", 8000)  # type: ignore[arg-type]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v2/host",
        "headers": [],
        "query_string": b"",
    }
    heard: list[Any] = []

    async def send(message: Any) -> None:
        heard.append(message)

    with pytest.raises(ZeroDivisionError):  # for the server to log
        await app(scope, None, send)  # type: ignore[arg-type]
    assert heard[0]["status"] == 500
    assert json.loads(heard[1]["body"])["error"] == "fault"
