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
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from PIL import Image

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.serving.ledger import IMAGES, JOBS, Ledger, Limits, NewImage, NewJob
from dalle_pytorch.serving.library import Library

EACH, TOGETHER, PORT = 4, 64, 8765
SERVER = f"http://127.0.0.1:{PORT}"
PROMPTS = ("a red apple", "a blue heart", "house, twemoji", "grinning cat, noto emoji")


def ask(path: str, body: dict | None = None, name: str = "") -> dict:
    """A JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "X-Name": name}
    with urlopen(Request(SERVER + path, data, headers), timeout=120) as answer:
        return json.load(answer)


def alone(seconds: float) -> float:
    """Images a second of the models without a server."""
    generator = Generator(load("emoji"), load("emoji", kind="clip"), batch_size=TOGETHER)
    sampling, drawn, start = SamplingConfig(cfg_scale=2.0, top_p=0.9), 0, 0.0
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(TOGETHER // EACH)]
    while not drawn or time.perf_counter() - start < seconds:
        for _ in generator.stream_each(prompts, range(EACH), num_keep=EACH, sampling=sampling):
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
            body = {"prompt": PROMPTS[number % len(PROMPTS)], "n": EACH, "seed": 1000 * number + turn}
            done = self.polled(body) if self.poll else len(ask("/v1/images/generations", body)["data"]) == EACH
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
    return EACH * sum(last[0] < end <= last[-1] for end in ends) / (last[-1] - last[0])


def memory_mb(pid: int) -> float:
    """What a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1000


@contextlib.contextmanager
def running(together: int, library: str | None = None) -> Iterator[int]:
    """A server with the weights that come along, once it is ready; its process id."""
    command = [sys.executable, "-m", "dalle_pytorch.commands.serve", f"port={PORT}", f"together={together}"]
    command.append("limits.owned=1000")
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen([*command, f"library={library or folder}"], stdout=subprocess.DEVNULL)
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


def fill(folder: str, images: int, waiting: int) -> str:
    """A library with so many images, eight of a job, and a paused queue of so many jobs; the last one's id."""
    library, sampling = Library(Path(folder)), asdict(SamplingConfig(cfg_scale=2.0, top_p=0.9))
    ledger = Ledger(f"sqlite:///{folder}/ledger.sqlite")
    picture, now = Image.effect_noise((64, 64), 60).convert("RGB"), time.time()
    parameters = {"seed": 1, "indices": list(range(8)), "keep": 8, "sampling": sampling, "negative_prompt": ""}
    with ledger.write() as connection:
        for number in range(images // 8):
            asked = {**parameters, "prompt": PROMPTS[number % len(PROMPTS)]}
            job = {
                "id": uuid.uuid4().hex, "owner": "anyone", "kind": "draw", "parameters": asked, "batch": "b",
                "count": 8, "state": "succeeded", "progress": 1.0, "created": now, "started": now + number,
                "finished": now + number + 1,
            }  # fmt: skip
            connection.execute(JOBS.insert().values(job))
            rows = []
            for place in range(8):
                new = NewImage(library.add(picture, asked), place, asked["prompt"], 1, place, 0.5, "model", asked)
                rows.append({**new._asdict(), "job": job["id"], "owner": "anyone", "created": now})
            connection.execute(IMAGES.insert(), rows)
    ledger.pause(True)
    new = [NewJob({**parameters, "prompt": f"number {i}"}, 8, "b") for i in range(waiting)]
    jobs = ledger.add("anyone", new, Limits(waiting, waiting))
    ledger.close()
    return jobs[-1].id


def crowd(images: int, waiting: int) -> None:
    """Print how fast routes answer where the library and the queue are full."""
    with tempfile.TemporaryDirectory() as folder:
        last = fill(folder, images, waiting)
        with running(TOGETHER, folder) as server:
            image, first = ask("/v1/images?limit=1")["images"][0]["url"], memory_mb(server)
            while not ask("/v1/images?similar=apple")["complete"]:
                pass
            paths = (
                "/", "/v1/jobs?limit=20", f"/v1/jobs/{last}", "/v1/queue", "/v1/queue/jobs", "/v1/images", image,
                "/v1/images?search=apple", "/v1/images?similar=apple", "/queue_status", "/getlibrary", "/metrics",
            )  # fmt: skip
            held = [memory_mb(server)]
            times = {path: list[float]() for path in paths}
            for _ in range(3):
                for path in paths:
                    for _ in range(50):
                        start = time.perf_counter()
                        with urlopen(SERVER + path, timeout=60) as answer:
                            answer.read()
                        times[path].append(1e3 * (time.perf_counter() - start))
                held.append(memory_mb(server))
            print(f"{images} images, {waiting} jobs waiting\n\n| route | median, ms | p95, ms |\n|---|---|---|")
            for path, taken in times.items():
                name = path.replace(last, "ID").replace(image, "/v1/images/ID.png")
                print(f"| {name} | {statistics.median(taken):.0f} | {sorted(taken)[int(0.95 * len(taken))]:.0f} |")
            rounds = ", ".join(f"{each:.0f}" for each in held)
            print(f"\nthe server holds {first:.0f} MB, then before and after each of three rounds {rounds} MB")


def turns() -> None:
    """Print how long one prompt waits that comes behind two hundred of somebody else, with and without turns."""
    print("| the prompt is | jobs before it | it starts after, s | it ends after, s | all end after, s |")
    print("|---" * 5 + "|")
    for label, name in (("another person's", "bob"), ("the same person's", "ann")):
        with running(TOGETHER):
            start = time.perf_counter()
            for number in range(200):
                body = {"prompt": PROMPTS[number % len(PROMPTS)], "n": EACH, "seed": number}
                last = ask("/v1/jobs", body, name="ann")["id"]
            job, before = ask("/v1/jobs", {"prompt": "house", "n": EACH}, name=name), time.perf_counter()
            position = job["position"]
            while job["state"] in ("queued", "running"):
                time.sleep(0.5)
                job = ask(f"/v1/jobs/{job['id']}")
            begun, ended = job["started"] - job["created"], time.perf_counter() - before
            while ask(f"/v1/jobs/{last}")["state"] in ("queued", "running"):
                time.sleep(0.5)
            whole = time.perf_counter() - start
        print(f"| {label} | {position} | {begun:.0f} | {ended:.0f} | {whole:.0f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--poll", type=float, default=0.0, help="seconds between two questions for a job's state")
    parser.add_argument("--jobs", type=int, default=0, help="instead: memory over so many jobs of one image")
    parser.add_argument("--turns", action="store_true", help="instead: how long one waits behind 200 of another's")
    parser.add_argument("--images", type=int, default=0, help="instead: routes beside so many, 1,000 jobs waiting")
    args = parser.parse_args()
    if args.jobs:
        hold(args.jobs)
        return
    if args.turns:
        turns()
        return
    if args.images:
        crowd(args.images, 1000)
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
    print(f"{args.clients} clients of {EACH} images: {rate:.1f} images/s = {rate / ceiling:.2f} of alone")
    middle, late = statistics.median(answers), answers[int(0.95 * len(answers))]
    print(f"GET /v1/jobs/ID: median {middle * 1e3:.0f} ms, p95 {late * 1e3:.0f} ms")
    print(f"a client waits {statistics.median(waits):.1f} s; the server holds {first:.0f} MB, at the end {last:.0f} MB")


if __name__ == "__main__":
    main()
