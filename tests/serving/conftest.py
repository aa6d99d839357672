"""A server with an engine that draws squares of one colour, and one with real, tiny models."""

import hashlib
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy
import torch
from fastapi.testclient import TestClient
from PIL import Image

from dalle_pytorch.errors import UserError
from dalle_pytorch.serving.app import make_app
from dalle_pytorch.serving.config import LimitsConfig, ServeConfig
from dalle_pytorch.serving.engine import Drawn, Step, png
from dalle_pytorch.serving.ledger import METADATA


def colour(prompt: str, seed: int, index: int) -> tuple[int, int, int]:
    return tuple(hashlib.sha256(f"{prompt} {seed} {index}".encode()).digest()[:3])


class Squares:
    """An Engine without a model: an image is a colour, a function of (prompt, seed, index)."""

    model, image_size, together = "squares", 8, 16

    def __init__(self, vae=None, *, seconds: float = 0.0, steps: int = 4, clip=None) -> None:
        self.vae, self.seconds, self.steps, self.clip = vae, seconds, steps, clip
        self.batches: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def check(self, request) -> None:
        if "forbidden" in request.prompt:
            raise UserError("this prompt cannot be drawn")

    def draw(self, requests):
        self.batches.append(len(requests))
        for step in range(self.steps):
            for number, request in enumerate(requests):
                if request.prompt == "defect":
                    raise RuntimeError("secret internals")
                yield Step(number, step / self.steps, lambda: png(Image.new("RGB", (8, 8), "grey")))
            self.may_go_on.wait(10)
            time.sleep(self.seconds / self.steps)
        for number, request in enumerate(requests):
            images = [
                (Image.new("RGB", (8, 8), colour(request.prompt, request.seed, index)), index, float(-place))
                for place, index in enumerate(request.indices[: request.keep])
            ]
            yield Drawn(number, images)


@pytest.fixture
def squares(tiny_vae):
    return Squares(tiny_vae)


@pytest.fixture
def serve(tmp_path):
    """Start a server in this process; ends with the test. Settings of limits are named without ``limits.``."""
    clients = []

    def start(engine, **settings) -> TestClient:
        names = ("images", "prompt", "queued", "owned", "hourly", "body_mb", "pixels")
        limits = LimitsConfig(**{name: settings.pop(name) for name in names if name in settings})
        config = ServeConfig(library=str(tmp_path / "library"), limits=limits, **settings)
        client = TestClient(
            make_app(config, lambda: engine), base_url="http://127.0.0.1", raise_server_exceptions=False
        )
        client.__enter__()
        clients.append(client)
        wait_for(lambda: client.get("/readyz").status_code == 200)
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def wait_for(condition, seconds: float = 20.0):
    """Wait until a condition holds; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("this never came true")


def ended(client, job: str, **options):
    """A job once it has ended."""

    def look():
        found = client.get(f"/v1/jobs/{job}", **options).json()
        return found if found["state"] in ("succeeded", "failed", "canceled") else None

    return wait_for(look)


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory):
    """Address of a PostgreSQL server of the test's own, of Debian's package; it does not run as root."""
    (tools,) = Path("/usr/lib/postgresql").glob("*/bin")
    folder = tmp_path_factory.mktemp("postgresql")
    shutil.chown(folder, "postgres")
    for parent in (folder, *folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o011)
    as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []

    def tool(name: str, *arguments: str) -> None:
        subprocess.run([*as_user, tools / name, *arguments], check=True, capture_output=True, cwd="/")

    tool("initdb", "--pgdata", f"{folder}/data", "--auth", "trust")
    options = f"-k {folder} -c listen_addresses='' -c max_connections=200"
    tool("pg_ctl", "--pgdata", f"{folder}/data", "--log", f"{folder}/log", "--options", options, "--wait", "start")
    yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    tool("pg_ctl", "--pgdata", f"{folder}/data", "--mode", "immediate", "stop")


def fresh(address: str) -> str:
    """The address of a database once it is empty."""
    engine = sqlalchemy.create_engine(address)
    METADATA.drop_all(engine)
    engine.dispose()
    return address
