"""What docs/serving.md shows runs."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import uvicorn

from dalle_pytorch.serving.app import make_app
from dalle_pytorch.serving.config import ServeConfig

from .conftest import Squares, wait_for

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
CODE = {
    name: (kind, code)
    for kind, name, code in re.findall(r"```(\w+)\n# ([\w.]+): [^\n]*\n(.*?)```", DOCS.read_text(), re.S)
}


@pytest.mark.parametrize(("name", "made"), [("images.py", ".png"), ("draw.py", ".png"), ("curl", ".zip")])
def test_the_three_ways_to_draw(name, made, tmp_path, tiny_vae):
    app = make_app(ServeConfig(library=str(tmp_path / "library")), lambda: Squares(tiny_vae))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started and app.state.hub.engine is not None)
    port, (kind, code) = server.servers[0].sockets[0].getsockname()[1], CODE[name]
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    command = [sys.executable, "-c", code] if kind == "python" else ["bash", "-eu", "-o", "pipefail", "-c", code]
    work = tmp_path / "work"
    work.mkdir()
    try:
        subprocess.run(command, cwd=work, check=True, timeout=60, env={**os.environ, "PYTHONPATH": ""})
    finally:
        server.should_exit = True
        thread.join(10)
    files = [file for file in work.iterdir() if file.suffix == made]
    assert len(files) == (1 if made == ".zip" else 2)
    assert all(file.stat().st_size > 60 for file in files)
