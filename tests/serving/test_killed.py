"""The whole program, killed at random moments."""

import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import trustme
from PIL import Image

from dalle_pytorch.serving.library import Library

from .conftest import fresh, wait_for

SERVER = """
import json
import sys
import uvicorn
from dalle_pytorch.serving.app import make_app
from dalle_pytorch.serving.config import ServeConfig
from tests.serving.conftest import Squares
app = make_app(ServeConfig(lease=1.0, **json.loads(sys.argv[2])), lambda: Squares(VAE(), seconds=0.1))
uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""
WORKER = """
import json
import sys
from pathlib import Path
from dalle_pytorch.serving.ledger import Ledger
from dalle_pytorch.serving.library import Library
from dalle_pytorch.serving.worker import Worker
from tests.serving.conftest import Squares
settings = json.loads(sys.argv[2])
Worker(Ledger(settings["database"], lease=1.0), Library(Path(settings["library"])), lambda: Squares(seconds=0.1)).run()
"""
VAE = """
import torch
class VAE(torch.nn.Module):
    image_size, grid_size, codebook_size = 8, 4, 2
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
"""
KILLS = int(os.environ.get("KILLS", "12"))
KILL_SECONDS = float(os.environ.get("KILL_SECONDS", "40"))


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


def run(code: str, port: int = 0, **settings) -> subprocess.Popen:
    """A program of these tests."""
    return subprocess.Popen(
        [sys.executable, "-c", code, str(port), json.dumps(settings)], cwd=Path(__file__).parents[2]
    )


def test_a_server_killed_at_random_moments_loses_and_doubles_nothing(tmp_path):
    """Clients ask again with their key until they are answered. Each job ends once, with all its images, whole."""
    port = free_port()
    url, library, dice = f"http://127.0.0.1:{port}", tmp_path / "library", random.Random(0)

    def start() -> subprocess.Popen:
        return run(VAE + SERVER, port, library=str(library))

    server, kills, accepted, asked, end = start(), 0, {}, 0, time.monotonic() + 20 * KILLS
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
        jobs = ended(url, accepted, end)
    finally:
        server.kill()
        server.wait()
    assert len(accepted) >= KILLS
    check(jobs, accepted, Library(library))


def ended(url: str, accepted: dict[str, str], end: float) -> dict[str, dict]:
    """Jobs by prompt once all have ended, or what has until some time."""
    jobs: dict[str, dict] = {}
    while len(jobs) < len(accepted) and time.monotonic() < end:
        for name in accepted.keys() - jobs.keys():
            found = ask(f"{url}/v1/jobs/{accepted[name]}")
            if found is not None and found["state"] not in ("queued", "running"):
                jobs[name] = found
        time.sleep(0.1)
    return jobs


def check(jobs: dict[str, dict], accepted: dict[str, str], files: Library) -> None:
    """Each job has ended, once, with all its images, whole, or with the reason."""
    assert len({job["id"] for job in jobs.values()}) == len(accepted)
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


@pytest.mark.postgresql
def test_three_workers_and_two_servers_killed_at_random_lose_and_double_nothing(tmp_path, postgresql):
    """One database, one folder; somebody is killed every second, and started again."""
    database = fresh(postgresql)
    settings, dice, seconds = (
        {"library": str(tmp_path / "library"), "database": database},
        random.Random(0),
        KILL_SECONDS,
    )
    ports = [free_port(), free_port()]
    starts = [lambda port=port: run(VAE + SERVER, port, workers=0, **settings) for port in ports]
    starts += [lambda: run(WORKER, **settings)] * 3
    running, accepted, asked, kills = [start() for start in starts], {}, 0, 0
    end, kill_at = time.monotonic() + seconds, time.monotonic() + 8
    try:
        while time.monotonic() < end:
            body = {"prompt": f"p{asked}", "n": 2, "seed": asked}
            answer = ask(f"http://127.0.0.1:{ports[dice.randrange(2)]}/v1/jobs", body, key=f"k{asked}")
            if answer is not None:
                accepted[f"p{asked}"] = answer["id"]
                asked += 1
            time.sleep(0.02)
            if time.monotonic() > kill_at:
                victim = dice.randrange(len(running))
                running[victim].kill()
                running[victim].wait()
                running[victim], kills, kill_at = starts[victim](), kills + 1, time.monotonic() + dice.uniform(0.5, 1.5)
        jobs = ended(f"http://127.0.0.1:{ports[0]}", accepted, end + 120)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert kills >= 0.5 * (seconds - 8) / 1.5
    check(jobs, accepted, Library(tmp_path / "library"))


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
        body = json.dumps({"prompt": "a red apple", "n": 64}).encode()
        request = Request(f"https://127.0.0.1:{port}/v1/images/generations", body, {"Content-Type": "application/json"})
        codes = []

        def draw() -> None:
            try:
                codes.append(urlopen(request, timeout=60, context=context).status)
            except urllib.error.HTTPError as error:
                codes.append(error.code)

        client = threading.Thread(target=draw)
        client.start()
        time.sleep(1)
        server.terminate()
        client.join(30)
        assert codes == [503]  # who waits is told
        assert server.wait(20) in (0, -signal.SIGTERM)
    finally:
        server.kill()


def test_a_worker_may_be_the_first_in_a_new_library(tmp_path):
    """It makes the folder and the ledger, says its name, and ends with a signal."""
    command = [sys.executable, "-m", "dalle_pytorch.commands.worker", f"library={tmp_path}/new"]
    worker = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline().startswith("worker ")
        worker.terminate()
        assert worker.wait(60) == 0
    finally:
        worker.kill()
        worker.stdout.close()
    assert (tmp_path / "new" / "ledger.sqlite").is_file()
