"""The whole program, killed at random moments."""

import json
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import trustme
from PIL import Image

from dalle_pytorch.serving.library import Library

from .conftest import wait_for

SERVER = """
import sys
import uvicorn
from dalle_pytorch.serving.app import make_app
from dalle_pytorch.serving.config import ServeConfig
from tests.serving.conftest import Squares
app = make_app(ServeConfig(library=sys.argv[2], lease=1.0), lambda: Squares(VAE(), seconds=0.1))
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""
VAE = """
import torch
class VAE(torch.nn.Module):
    image_size, grid_size, codebook_size = 8, 4, 2
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
"""
KILLS = 12


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ask(url: str, body: dict | None = None, key: str = "") -> dict | None:
    """An answer; None while nobody answers, or not yet."""
    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
    try:
        with urlopen(Request(url, None if body is None else json.dumps(body).encode(), headers), timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code != 503:  # the models are not loaded yet
            raise
    except OSError:
        pass
    return None


def test_a_server_killed_at_random_moments_loses_and_doubles_nothing(tmp_path):
    """Clients ask again with their key until they are answered. Each job ends once, with all its images, whole."""
    port = free_port()
    url, library, dice = f"http://127.0.0.1:{port}", tmp_path / "library", random.Random(0)
    command = [sys.executable, "-c", VAE + SERVER, str(port), str(library)]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=Path(__file__).parents[2])

    server, kills, accepted, asked, end = start(), 0, {}, 0, time.monotonic() + 240
    kill_at = None
    try:
        while kills < KILLS and time.monotonic() < end:
            answer = ask(f"{url}/v1/jobs", {"prompt": f"p{asked}", "n": 2, "seed": asked}, key=f"k{asked}")
            if answer is not None:
                accepted[f"p{asked}"] = answer["id"]
                asked += 1
                kill_at = kill_at or time.monotonic() + dice.uniform(0, 0.8)
            time.sleep(0.02)
            if kill_at is not None and time.monotonic() > kill_at:
                server.send_signal(signal.SIGKILL)
                server.wait()
                server, kills, kill_at = start(), kills + 1, None
        assert kills == KILLS
        jobs: dict[str, dict] = {}
        while len(jobs) < len(accepted) and time.monotonic() < end:
            for name in accepted.keys() - jobs.keys():
                found = ask(f"{url}/v1/jobs/{accepted[name]}")
                if found is not None and found["state"] not in ("queued", "running"):
                    jobs[name] = found
            time.sleep(0.1)
    finally:
        server.kill()
        server.wait()
    assert len({job["id"] for job in jobs.values()}) == len(accepted) >= KILLS
    files = Library(library)
    for name, job in jobs.items():
        if job["state"] == "failed":
            assert "died 3 times" in job["error"]
            continue
        assert job["state"] == "succeeded"
        assert [image["place"] for image in job["images"]] == [0, 1]
        for image in job["images"]:
            with Image.open(files.path(image["id"])) as picture:
                picture.load()
            assert files.notes(image["id"])["prompt"] == name


def test_the_command_serves_https_and_ends_with_a_signal(tmp_path):
    """With a certificate; plain HTTP gets no answer. The weights that come along are loaded."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    context = ssl.create_default_context()
    authority.configure_trust(context)
    port = free_port()
    settings = [
        f"port={port}",
        f"library={tmp_path}/library",
        f"tls_cert={tmp_path}/cert.pem",
        f"tls_key={tmp_path}/key.pem",
    ]
    server = subprocess.Popen([sys.executable, "-m", "dalle_pytorch.commands.serve", *settings], cwd=tmp_path)

    def ready() -> bool:
        try:
            with urlopen(f"https://127.0.0.1:{port}/readyz", timeout=5, context=context) as answer:
                return json.load(answer)["status"] == "ready"
        except OSError:
            return False

    try:
        wait_for(ready, 60)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5)
        server.terminate()
        assert server.wait(20) in (0, -signal.SIGTERM)
    finally:
        server.kill()
