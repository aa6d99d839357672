"""Requests that nobody thought of: schemathesis makes them up from the description of the API. ``make server-test``."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvicorn

from dalle_pytorch.serving.app import make_app
from dalle_pytorch.serving.config import ServeConfig

from .conftest import Squares, wait_for

SECONDS = os.environ.get("FUZZ_SECONDS", "40")


@pytest.mark.fuzz
def test_no_request_breaks_the_server(tmp_path, tiny_vae):
    app = make_app(ServeConfig(library=str(tmp_path / "library")), lambda: Squares(tiny_vae))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started and app.state.hub.engine is not None)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    tool = Path(sys.executable).with_name("schemathesis")
    command = [
        tool,
        "run",
        f"{url}/openapi.json",
        "--checks",
        "not_a_server_error",
        "--max-time",
        SECONDS,
        "--no-color",
    ]
    try:
        done = subprocess.run([*command, "--seed", "0"], cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        server.should_exit = True
        thread.join(10)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
