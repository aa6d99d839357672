"""A server under load: many clients at once against the same models alone.

    python benchmarks/serving.py --clients 50 --seconds 60

Each client asks OpenAI's route for 4 images, gets them, and asks again; with --poll it queues a job and asks for its
state every so many seconds. Meanwhile one more client asks for the state of a job, ten times a second. Alone, the same
models draw micro-batches of as many images as the server draws together.
"""

import argparse
import contextlib
import http.client
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import torch

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.sampling import SamplingConfig

IMAGES, TOGETHER, PORT = 4, 64, 8765
SERVER = f"http://127.0.0.1:{PORT}"
PROMPTS = ("a red apple", "a blue heart", "house, twemoji", "grinning cat, noto emoji")


def ask(path: str, body: dict | None = None) -> dict:
    """A JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(SERVER + path, data, {"Content-Type": "application/json"}), timeout=120) as answer:
        return json.load(answer)


def alone(seconds: float) -> float:
    """Images a second of the models without a server."""
    generator = Generator(load("emoji"), load("emoji", kind="clip"), batch_size=TOGETHER)
    sampling, drawn, start = SamplingConfig(cfg_scale=2.0, top_p=0.9), 0, 0.0
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(TOGETHER // IMAGES)]
    while not drawn or time.perf_counter() - start < seconds:
        for _ in generator.stream_each(prompts, range(IMAGES), num_keep=IMAGES, sampling=sampling):
            pass
        if not start:  # the first batch warms up
            start = time.perf_counter()
        else:
            drawn += TOGETHER
    return drawn / (time.perf_counter() - start)


class Load:
    """Clients that ask until they are stopped."""

    def __init__(self, poll: float) -> None:
        self.poll = poll
        self.stopped, self.ends, self.waits, self.answers = (
            threading.Event(),
            list[float](),
            list[float](),
            list[float](),
        )

    def client(self, number: int) -> None:
        """One client, until the server is gone."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.ask_on(number)

    def ask_on(self, number: int) -> None:
        """Ask for images again and again."""
        turn = 0
        while not self.stopped.is_set():
            turn += 1
            asked = time.perf_counter()
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "n": IMAGES, "seed": 1000 * number + turn}
            done = self.polled(body) if self.poll else len(ask("/v1/images/generations", body)["data"]) == IMAGES
            if done:
                self.ends.append(time.perf_counter())
                self.waits.append(self.ends[-1] - asked)

    def polled(self, body: dict) -> bool:
        """Queue a job and ask for its state until it ends; whether it has succeeded."""
        job = ask("/v1/jobs", body)
        while job["state"] in ("queued", "running") and not self.stopped.is_set():
            time.sleep(self.poll)
            job = ask(f"/v1/jobs/{job['id']}")
        return job["state"] == "succeeded"

    def watch(self) -> None:
        """The client that asks for a state."""
        job = ask("/v1/jobs", {"prompt": PROMPTS[0], "n": 1})["id"]
        while not self.stopped.wait(0.1):
            asked = time.perf_counter()
            ask(f"/v1/jobs/{job}")
            self.answers.append(time.perf_counter() - asked)


def images_a_second(ends: list[float]) -> float:
    """Speed from the end of the first batch to that of the last; jobs of a batch end together.

    Args:
        ends: when each job has ended, in order.
    """
    last = [end for end, later in zip(ends, [*ends[1:], math.inf], strict=True) if later > end + 1]  # of each batch
    return IMAGES * sum(last[0] < end <= last[-1] for end in ends) / (last[-1] - last[0])


def memory_mb(pid: int) -> float:
    """What a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1000


@contextlib.contextmanager
def running(together: int) -> Iterator[int]:
    """A server with the weights that come along, once it is ready; its process id."""
    command = [sys.executable, "-m", "dalle_pytorch.commands.serve", f"port={PORT}", f"together={together}"]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([*command, f"library={folder}"], stdout=subprocess.DEVNULL)
        try:
            for _ in range(240):
                with contextlib.suppress(OSError):
                    ask("/readyz")
                    break
                time.sleep(0.25)
            yield server.pid
        finally:
            server.terminate()
            server.wait(20)


def hold(jobs: int) -> None:
    """Print what a server holds while it draws many small jobs."""
    with running(TOGETHER) as server:
        for done in range(0, jobs, 100):
            body = {"prompt": PROMPTS[done // 100 % len(PROMPTS)], "n": 1}
            names = [ask("/v1/jobs", body)["id"] for _ in range(100)]
            while ask(f"/v1/jobs/{names[-1]}")["state"] in ("queued", "running"):
                time.sleep(0.5)
            print(f"after {done + 100} jobs: {memory_mb(server):.0f} MB", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--poll", type=float, default=0.0, help="seconds between two questions for a job's state")
    parser.add_argument("--jobs", type=int, default=0, help="instead: memory over so many jobs of one image")
    args = parser.parse_args()
    if args.jobs:
        hold(args.jobs)
        return
    ceiling = alone(args.seconds / 2)
    print(f"alone, micro-batches of {TOGETHER}: {ceiling:.1f} images/s ({torch.get_num_threads()} threads)", flush=True)
    with running(TOGETHER) as server:
        load_ = Load(args.poll)
        work = [threading.Thread(target=load_.client, args=(i,), daemon=True) for i in range(args.clients)]
        work.append(threading.Thread(target=load_.watch, daemon=True))
        for thread in work:
            thread.start()
        time.sleep(args.seconds / 4)  # until all clients wait for images
        start, first = time.perf_counter(), memory_mb(server)
        load_.answers.clear()
        time.sleep(args.seconds)
        ends, last = sorted(end for end in load_.ends if end > start), memory_mb(server)
        rate = images_a_second(ends)
        answers, waits = sorted(load_.answers), sorted(load_.waits)
        load_.stopped.set()
    print(f"{args.clients} clients of {IMAGES} images: {rate:.1f} images/s = {rate / ceiling:.2f} of alone")
    middle, late = statistics.median(answers), answers[int(0.95 * len(answers))]
    print(f"GET /v1/jobs/ID: median {middle * 1e3:.0f} ms, p95 {late * 1e3:.0f} ms")
    print(f"a client waits {statistics.median(waits):.1f} s; the server holds {first:.0f} MB, at the end {last:.0f} MB")


if __name__ == "__main__":
    main()
