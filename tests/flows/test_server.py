"""Prefect's temporary server, for real: on a port of its own, gone when the process is."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from flows.server import Unreachable, start_prefect_api
from tests.flows.project import ROOT

SCRIPT = """
from flows.server import start_prefect_api
ready = start_prefect_api()
ready()
import os, sys
from urllib.request import urlopen
print(os.environ["PREFECT_API_URL"], urlopen(os.environ["PREFECT_API_URL"] + "/health").read().decode(), "prefect" in sys.modules)
"""


def test_the_server_comes_up_on_a_free_port_and_ends_with_the_process(project: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "PREFECT_HOME")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    url, healthy, imported = done.stdout.split()
    assert (healthy, imported) == ("true", "False")
    assert (project / ".headwise/prefect/prefect.db").is_file() and (project / ".headwise/prefect/server.log").is_file()
    with pytest.raises(URLError):
        urlopen(f"{url}/health", timeout=5)


def test_a_named_server_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(Unreachable, match=r"PREFECT_API_URL = http://127\.0\.0\.1:9/api: no answer"):
        start_prefect_api()


def test_a_port_that_something_else_holds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{other.getsockname()[1]}/api"
        monkeypatch.setenv("PREFECT_API_URL", url)
        pool.submit(_answer_as_ssh, other)
        with pytest.raises(Unreachable, match=f"PREFECT_API_URL = {url}: no answer .*SSH-2.0"):
            start_prefect_api()


def _answer_as_ssh(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"SSH-2.0-other\r\n")


def test_a_second_temporary_server_takes_another_port_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[socket.socket] = []
    monkeypatch.setattr("flows.server._start", lambda listener: held.append(listener.dup()))
    monkeypatch.setattr("atexit.register", lambda *_: None)
    for _ in range(2):
        monkeypatch.setenv("PREFECT_API_URL", "")
        monkeypatch.setenv("PREFECT_UI_URL", "somewhere")
        start_prefect_api()
    ports = {listener.getsockname()[1] for listener in held}
    for listener in held:
        listener.close()
    assert len(ports) == 2
