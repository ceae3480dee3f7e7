"""Servers: are those that the environment names alive, and a temporary one for Prefect where it names none.

Prefect starts a temporary server by itself, but only when the first flow runs, and imports all of the server's code a second time to do so.
Started here, it comes up in a process beside ours while this one still imports torch and MLflow; that halves the time of a run that
has nothing to do.
"""

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes import CDLL
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from flows.environment import state

API, UI = "PREFECT_API_URL", "PREFECT_UI_URL"
LOG = "server.log"
PATIENCE_S = 300.0
PR_SET_PDEATHSIG = 1
"""Linux, `prctl(2)`: the signal that a process gets when its parent dies."""


class Unreachable(ConnectionError):
    """A server that the environment names does not answer; said before any work is done."""


def check_reachable(uri: str, variable: str) -> None:
    """Ask a server for its health once, before any work.

    Raises Unreachable, naming the variable that points to it, if nobody answers within 5 seconds.
    """
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    try:
        with urlopen(f"{uri.rstrip('/')}/health", timeout=5):
            pass
    except HTTPError as error:
        if error.code >= 500:
            raise Unreachable(f"{variable} = {uri}: the server answers {error.code}; nothing was run") from error
    except (URLError, OSError, HTTPException) as error:  # HTTPException: something else has the port
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{variable} = {uri}: no answer ({reason}); start the server or unset the variable; nothing was run") from error


def start_prefect_api() -> Callable[[], None]:
    """Point Prefect at a server; call what this returns before the first flow runs, it waits until the server answers.

    With PREFECT_API_URL set that server must answer. Otherwise a temporary one starts in the background, on sqlite under PREFECT_HOME.
    Call it before Prefect is imported. Raises Unreachable, when waiting too, then naming the server's log.
    """
    if os.environ.get(API):
        check_reachable(os.environ[API], API)
        return lambda: None
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel chooses the port and it is ours at once: none can be in use
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        process = _start(listener)
    os.environ[API], os.environ[UI] = address, ""  # no page to look at, so Prefect names none
    atexit.register(_stop, process)  # runs after Prefect's own threads have handed in their last log lines
    return lambda: _wait(process, address)


def _start(listener: socket.socket) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error"]
    environment = {**os.environ, "PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    log = state() / "prefect" / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "--fd", str(listener.fileno())],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C reaches the run alone, which still has to tell the server that it was stopped
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def _end_with_parent() -> None:
    """A run that is killed outright leaves no server behind that holds the database."""
    CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(URLError, OSError), urlopen(f"{address}/health", timeout=PATIENCE_S):
            return
        time.sleep(0.05)
    raise Unreachable(f"Prefect's temporary server did not start; its log is {state() / 'prefect' / LOG}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
