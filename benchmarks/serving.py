"""A server under load: many clients at once against the same models alone.

    python benchmarks/serving.py --clients 50 --seconds 60

Each client asks for 4 images, waits for them, and asks again. Meanwhile one more client asks for the state of a job,
ten times a second. Alone, the same models draw micro-batches of as many images as the server draws together.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
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

    def __init__(self) -> None:
        self.stopped, self.images, self.waits, self.answers = threading.Event(), 0, list[float](), list[float]()
        self.last = ""

    def client(self, number: int) -> None:
        """One client."""
        turn = 0
        while not self.stopped.is_set():
            turn += 1
            asked = time.perf_counter()
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "n": IMAGES, "seed": 1000 * number + turn}
            job = ask("/v1/jobs", body)
            self.last = job["id"]
            while job["state"] in ("queued", "running") and not self.stopped.is_set():
                time.sleep(0.5)
                job = ask(f"/v1/jobs/{job['id']}")
            if job["state"] == "succeeded":
                self.images += IMAGES
                self.waits.append(time.perf_counter() - asked)

    def watch(self) -> None:
        """The client that asks for a state."""
        while not self.stopped.wait(0.1):
            if self.last:
                asked = time.perf_counter()
                ask(f"/v1/jobs/{self.last}")
                self.answers.append(time.perf_counter() - asked)


def memory_mb(pid: int) -> float:
    """What a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    ceiling = alone(args.seconds / 2)
    print(f"alone, micro-batches of {TOGETHER}: {ceiling:.1f} images/s ({torch.get_num_threads()} threads)", flush=True)
    command = [sys.executable, "-m", "dalle_pytorch.commands.serve", f"port={PORT}", f"together={TOGETHER}"]
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([*command, f"library={folder}"], stdout=subprocess.DEVNULL)
        try:
            for _ in range(240):
                try:
                    ask("/readyz")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.25)
            load_ = Load()
            work = [threading.Thread(target=load_.client, args=(i,), daemon=True) for i in range(args.clients)]
            work.append(threading.Thread(target=load_.watch, daemon=True))
            for thread in work:
                thread.start()
            time.sleep(args.seconds / 4)  # until all clients wait for images
            before, start, first = load_.images, time.perf_counter(), memory_mb(server.pid)
            load_.answers.clear()
            time.sleep(args.seconds)
            rate, last = (load_.images - before) / (time.perf_counter() - start), memory_mb(server.pid)
            answers, waits = sorted(load_.answers), sorted(load_.waits)
            load_.stopped.set()
        finally:
            server.terminate()
            server.wait(20)
    print(f"{args.clients} clients of {IMAGES} images: {rate:.1f} images/s = {rate / ceiling:.2f} of alone")
    middle, late = statistics.median(answers), answers[int(0.95 * len(answers))]
    print(f"GET /v1/jobs/ID: median {middle * 1e3:.0f} ms, p95 {late * 1e3:.0f} ms")
    print(f"a client waits {statistics.median(waits):.1f} s; the server holds {first:.0f} MB, at the end {last:.0f} MB")


if __name__ == "__main__":
    main()
