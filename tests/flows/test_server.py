"""Prefect's temporary server, for real: on a port of its own, gone when the process is."""

import os
import subprocess
import sys
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
