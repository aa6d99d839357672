"""The ledger: order, leases, and that nothing is lost or done twice, whoever dies when."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy
import torch
from PIL import Image

from dalle_pytorch.errors import UserError
from dalle_pytorch.serving.doctor import repair
from dalle_pytorch.serving.ledger import (
    DIED,
    MAX_ATTEMPTS,
    Conflict,
    Cursor,
    Job,
    Ledger,
    Limits,
    NewImage,
    NewJob,
    QueueFull,
)  # fmt: skip
from dalle_pytorch.serving.library import Library
from dalle_pytorch.serving.worker import MAX_DEFECTS, Worker

from .conftest import Squares, fresh, wait_for

SAMPLING = {"temperature": 1.0}
ROOM = Limits(queued=1000, owned=1000)


def parameters(prompt: str = "a", keep: int = 1) -> dict:
    return {"prompt": prompt, "seed": 0, "indices": list(range(keep)), "keep": keep, "sampling": SAMPLING}


def add(
    ledger: Ledger, prompt: str = "a", *, owner: str = "me", batch: str = "b", keep: int = 1, priority: int = 0,
    limits: Limits = ROOM, person: str | None = None, **more,
) -> Job:  # fmt: skip
    (job,) = ledger.add(
        owner, [NewJob(parameters(prompt, keep), keep, batch, priority)], limits, person=person or owner, **more
    )
    return job


def image(number: int = 0) -> NewImage:
    return NewImage(f"{number:032x}", 0, "a", 0, 0, None, "model", {})


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def url(request, tmp_path):
    """Address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite"
    return fresh(request.getfixturevalue("postgresql"))


@pytest.fixture
def ledger(url):
    ledger = Ledger(url, lease=0.5)
    yield ledger
    ledger.close()


def test_the_highest_priority_then_the_first_come(ledger):
    late, first, second = add(ledger, priority=-1), add(ledger), add(ledger)
    assert [ledger.ahead(job.id).jobs for job in (late, first, second)] == [2, 0, 1]
    claimed = [ledger.claim("w", 1)[0].id for _ in range(3)]
    assert claimed == [first.id, second.id, late.id]
    assert ledger.claim("w", 1) == []


def test_jobs_of_a_batch_are_claimed_together(ledger):
    alike = [add(ledger, keep=4).id for _ in range(3)]
    other = add(ledger, batch="other").id
    more = add(ledger, keep=4).id
    assert [job.id for job in ledger.claim("w", 12)] == alike
    assert [job.id for job in ledger.claim("w", 12)] == [other]
    assert [job.id for job in ledger.claim("w", 2)] == [more]  # one job, even if it is too large


def test_every_job_is_claimed_once(ledger):
    wanted, claimed = {add(ledger, batch=str(i % 7)).id for i in range(60)}, []

    def work(name: str) -> None:
        while jobs := ledger.claim(name, 3):
            claimed.extend(job.id for job in jobs)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(claimed) == Counter(wanted)


def test_the_job_of_a_dead_worker_is_done_by_another_and_once(ledger):
    job = add(ledger).id
    ledger.claim("dead", 1)
    assert ledger.claim("next", 1) == []
    time.sleep(0.6)
    assert [found.id for found in ledger.claim("next", 1)] == [job]
    assert ledger.beat("dead", [job]).lost == {job}
    assert not ledger.finish("dead", job, [image(1)])
    assert ledger.finish("next", job, [image(2)])
    assert not ledger.finish("next", job, [image(3)])
    assert [row["id"] for row in ledger.images(job=job)] == [image(2).id]


def test_a_heartbeat_keeps_the_lease(ledger):
    job = add(ledger).id
    ledger.claim("slow", 1)
    for _ in range(4):
        time.sleep(0.25)
        assert ledger.beat("slow", [job]) == (set(), set())
        assert ledger.claim("next", 1) == []


def test_a_job_that_kills_its_workers_fails_with_the_reason(ledger):
    job = add(ledger).id
    for attempt in range(MAX_ATTEMPTS):
        assert ledger.claim(f"w{attempt}", 1)
        time.sleep(0.55)
    assert ledger.claim("next", 1) == []
    found = ledger.get(job)
    assert (found.state, found.error, found.attempts) == ("failed", DIED, MAX_ATTEMPTS)


def test_canceled_jobs_leave_no_images(ledger):
    waiting, running = add(ledger).id, add(ledger, priority=1).id
    ledger.claim("w", 1)
    ledger.cancel(waiting)
    ledger.cancel(running)
    assert ledger.get(waiting).state == "canceled"
    assert ledger.beat("w", [running]).lost == {running}
    assert not ledger.finish("w", running, [image()])
    ledger.end("w", [running], "canceled")
    assert ledger.get(running).state == "canceled"
    assert ledger.images() == []
    ledger.cancel(waiting)  # once more changes nothing
    assert ledger.claim("w", 1) == []


def test_a_worker_that_stops_gives_its_job_back(ledger):
    job = add(ledger).id
    ledger.claim("w", 1)
    ledger.give_back("w", [job])
    found = ledger.get(job)
    assert (found.state, found.attempts) == ("queued", 0)
    ledger.claim("w", 1)
    ledger.cancel(job)  # and the worker stops before it hears of it
    ledger.give_back("w", [job])
    assert ledger.get(job).state == "canceled"


def test_a_key_makes_one_job(ledger):
    one, again = (add(ledger, "a", key="k", digest="r") for _ in range(2))
    assert one.id == again.id
    assert add(ledger, "a", key="k", digest="r", owner="you").id != one.id
    with pytest.raises(Conflict):
        add(ledger, "b", key="k", digest="s")


def test_requests_at_the_same_time_keep_the_limits_and_share_a_key(ledger):
    """Eight clients at once, three times each."""
    found: list[object] = []

    def ask(number: int) -> None:
        for turn in range(3):
            try:
                found.append(add(ledger, key=f"k{turn}", digest="r", limits=Limits(1000, 2)).id)
            except QueueFull as error:
                found.append(error)
            except Exception as error:
                found.append(repr(error))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ids = [each for each in found if isinstance(each, str)]
    assert len(set(ids)) == 2
    assert len(ids) == 16
    assert len(ledger.jobs(limit=100)) == 2


def test_a_ledger_can_be_opened_by_many_at_once(url):
    """Server and workers start together on an empty database."""
    failures: list[str] = []

    def start() -> None:
        try:
            Ledger(url).close()
        except UserError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_ledger_of_another_version_is_refused(url):
    Ledger(url).close()
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE jobs DROP COLUMN request")
    engine.dispose()
    with pytest.raises(UserError, match=r"no jobs.request.*repair=true"):
        Ledger(url)


def test_passwords_are_not_told():
    with pytest.raises(UserError, match="cannot be opened") as caught:
        Ledger("postgresql+psycopg://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(caught.value)


def test_low_priority_does_not_ride_along(ledger):
    low, high = add(ledger, priority=-1).id, add(ledger).id
    assert [job.id for job in ledger.claim("w", 10)] == [high]
    assert [job.id for job in ledger.claim("w", 10)] == [low]


def test_speed_counts_a_batch_once(ledger):
    for _ in range(4):
        add(ledger, keep=2)
    jobs = ledger.claim("w", 8)
    time.sleep(0.4)
    for number, job in enumerate(jobs):
        assert ledger.finish("w", job.id, [image(number)])
    assert 0.05 <= ledger.seconds_an_image() < 0.3  # 0.4 s for 8 images, and some time for the database


def test_pages_go_on_where_the_last_one_ended(ledger):
    """Whatever is deleted or added in between."""
    for number in range(5):
        job = add(ledger, f"{number}", keep=2).id
        ledger.claim("w", 1)
        ledger.finish("w", job, [image(2 * number + place)._replace(place=place) for place in range(2)])
    order = [row["id"] for row in ledger.images()]
    first = ledger.images(limit=4)
    assert [row["id"] for row in first] == order[:4]
    ledger.forget(first[0]["id"])
    assert [row["id"] for row in ledger.images(before=Cursor.of(first[-1]))] == order[4:]
    jobs = [job.id for job in ledger.jobs()]
    assert [job.id for job in ledger.jobs(before=jobs[1])] == jobs[2:]


def test_the_queue_has_an_end(ledger):
    for _ in range(2):
        add(ledger, limits=Limits(1000, 2))
    with pytest.raises(QueueFull):
        add(ledger, limits=Limits(1000, 2))
    add(ledger, limits=Limits(1000, 2), owner="you")
    with pytest.raises(QueueFull):
        add(ledger, limits=Limits(3, 1000), owner="third")


def test_owners_see_their_own(ledger):
    job = add(ledger, owner="me").id
    assert ledger.get(job, "me").id == job
    with pytest.raises(KeyError):
        ledger.get(job, "you")
    assert ledger.jobs("you") == []


def test_search_takes_signs_as_they_are(ledger):
    for number, prompt in enumerate(("50% off", "505 off", "A_b", "Axb")):
        job = add(ledger, prompt).id
        ledger.claim("w", 1)
        assert ledger.finish("w", job, [image(number)._replace(prompt=prompt)])
    for text, found in (("50%", ["50% off"]), ("a_B", ["A_b"]), ("OFF", ["505 off", "50% off"]), ("'", [])):
        assert [row["prompt"] for row in ledger.images(text=text)] == found


def _work(folder: Path, url: str) -> None:
    ledger = Ledger(url, lease=0.6)
    Worker(ledger, Library(folder), lambda: Squares(seconds=0.05)).run()


def test_workers_killed_at_random_moments_lose_and_double_nothing(tmp_path, url):
    """50 times SIGKILL among three workers: jobs end succeeded with all their images, or failed with the reason."""
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    ledger = Ledger(url, lease=0.6)
    jobs = [add(ledger, f"prompt {i}", keep=3, batch=str(i % 3)).id for i in range(120)]
    ledger.close()  # a connection must not cross a fork
    workers, killed, end = [], 0, time.monotonic() + 120
    while killed < 50 or ledger.counts().keys() & {"queued", "running"}:
        ledger.close()
        workers = [worker for worker in workers if worker.is_alive()]
        while len(workers) < 3:
            workers.append(context.Process(target=_work, args=(tmp_path, url), daemon=True))
            workers[-1].start()
        time.sleep(rng.uniform(0.02, 0.25))
        assert time.monotonic() < end, ledger.counts()
        if killed < 50:
            if len(ledger.jobs(states=["queued", "running"], limit=10)) < 10:  # keep them busy
                jobs += [add(ledger, f"more {killed}", keep=3, batch=str(i % 3)).id for i in range(12)]
            victim = rng.choice(workers)
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            killed += 1
    for worker in workers:
        worker.kill()
        worker.join()
    library, states = Library(tmp_path), Counter()
    for job in jobs:
        found = ledger.get(job)
        states[found.state] += 1
        rows = ledger.images(job=job)
        if found.state == "succeeded":
            assert [row["place"] for row in rows] == [0, 1, 2]
            for row in rows:
                with Image.open(library.path(row["id"])) as picture:
                    picture.load()
        else:
            assert (found.state, found.error, rows) == ("failed", DIED, [])
    assert states["succeeded"] > 0.8 * len(jobs)
    ledger.close()


def test_a_worker_whose_models_are_missing_says_so(tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite")

    def broken():
        raise FileNotFoundError("no such weights")

    worker = Worker(ledger, Library(tmp_path), broken)
    worker.run()
    assert worker.failure == "the models cannot be loaded: no such weights"
    ledger.close()


class Broken(Squares):
    """Draws nothing but errors of some kind."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def draw(self, requests):
        if not requests:
            yield
        raise self.error


@pytest.mark.parametrize(("error", "tried"), [(RuntimeError("x"), MAX_DEFECTS - 1), (torch.AcceleratorError("x"), 0)])
def test_a_broken_device_does_not_empty_the_queue(tmp_path, error, tried):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite")
    for number in range(20):
        add(ledger, batch=f"{number}")
    worker = Worker(ledger, Library(tmp_path), lambda: Broken(error))
    worker.run()
    assert type(error).__name__ in worker.failure
    assert ledger.counts() == {"queued": 20 - tried} | ({"failed": tried} if tried else {})
    ledger.close()


def test_a_job_fails_alone(tmp_path):
    """Three jobs of a batch, the one in the middle cannot be drawn: each is drawn by itself."""
    ledger, library, engine = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite"), Library(tmp_path), Squares()
    jobs = [add(ledger, prompt).id for prompt in ("a", "defect", "b")]
    worker = Worker(ledger, library, lambda: engine)
    while claimed := ledger.claim(worker.name, 16):
        worker.work(engine, claimed)
    assert [ledger.get(job).state for job in jobs] == ["succeeded", "failed", "succeeded"]
    ledger.close()


def test_a_job_survives_what_it_does_not_need(tmp_path, monkeypatch):
    """Neither a preview that fails nor a note that cannot be written ends it."""
    ledger, library, engine = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite"), Library(tmp_path), Squares()
    job = add(ledger).id
    worker = Worker(ledger, library, lambda: engine)
    monkeypatch.setattr(ledger, "note", lambda *_: 1 / 0)
    worker.work(engine, ledger.claim(worker.name, 1))
    assert ledger.get(job).state == "succeeded"
    ledger.close()


def test_a_job_finished_while_files_are_checked_keeps_its_images(tmp_path, monkeypatch):
    ledger, library = filled(tmp_path, jobs=1)
    known = ledger.image_ids
    monkeypatch.setattr(ledger, "image_ids", lambda among=None: set() if among is None else known(among))
    assert repair(ledger, library).removed == 0
    assert len(library.ids()) == 2
    ledger.close()


def test_wait_for_times_out():
    with pytest.raises(AssertionError):
        wait_for(lambda: False, seconds=0.05)


def filled(folder: Path, jobs: int = 3) -> tuple[Ledger, Library]:
    """A library with two images of each of some jobs."""
    ledger, library = Ledger(f"sqlite:///{folder}/ledger.sqlite"), Library(folder)
    worker = Worker(ledger, library, Squares)
    for number in range(jobs):
        add(ledger, f"prompt {number}", keep=2)
    for _ in range(jobs):
        worker.work(Squares(), ledger.claim(worker.name, 1))
    return ledger, library


def test_a_lost_ledger_is_written_anew_from_the_files(tmp_path):
    ledger, _ = filled(tmp_path)
    rows = ledger.images()
    ledger.close()
    for file in tmp_path.glob("ledger.sqlite*"):
        file.unlink()
    again, library = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite"), Library(tmp_path)
    assert repair(again, library)[:3] == (6, 0, 0)
    names = ("id", "job", "owner", "place", "prompt", "seed", "index", "score", "model", "parameters")
    key = lambda row: (row["job"], row["place"])  # noqa: E731
    for old, new in zip(sorted(rows, key=key), sorted(again.images(), key=key), strict=True):
        assert {name: old[name] for name in names} == {name: new[name] for name in names}
    assert repair(again, library)[:3] == (0, 0, 0)
    again.close()


def test_left_over_files_and_rows_go(tmp_path):
    ledger, library = filled(tmp_path)
    first, second, *_ = ledger.images()
    library.delete(first["id"])
    left = library.add(Image.new("RGB", (8, 8)), library.notes(second["id"]))  # of an attempt that was killed
    strange = library.path("0" * 32)
    strange.parent.mkdir(exist_ok=True)
    strange.write_bytes(b"no image")
    found = repair(ledger, library)
    assert found == (0, 1, 1, [str(strange)])
    assert left not in library.ids()
    assert "1 left-over files deleted" in str(found)
    assert len(ledger.images()) == 5
    ledger.close()


# ---- people


def test_people_take_turns(ledger):
    """One with many jobs does not keep others waiting; within a person the order stays."""
    for i in range(20):
        add(ledger, f"a{i}", person="ann")
    ledger.claim("w", 1)
    for i in range(2):
        add(ledger, f"b{i}", person="bob")
    add(ledger, "c0", person="cid")
    prompts = [job.parameters["prompt"] for job in ledger.queue()]
    assert prompts[:7] == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]
    drawn = [ledger.claim("w", 1)[0].parameters["prompt"] for _ in range(6)]
    assert drawn == prompts[1:7]
    waiting = [job for job in ledger.queue() if job.state == "queued"]
    running = len(ledger.queue()) - len(waiting)
    assert [ledger.ahead(job.id).jobs for job in waiting] == [running + i for i in range(len(waiting))]


def test_who_comes_late_is_not_before_those_who_wait_long(ledger):
    """A newcomer's hundred jobs do not go before what somebody else has waiting, low priorities aside."""
    add(ledger, "low", person="low", priority=-5)
    for i in range(30):
        add(ledger, f"a{i}", person="ann")
    for _ in range(20):
        ledger.claim("w", 1)
    for i in range(100):
        add(ledger, f"b{i}", person="bob")
    prompts = [job.parameters["prompt"] for job in ledger.queue() if job.state == "queued"]
    assert prompts[:4] == ["a20", "b0", "a21", "b1"]
    assert prompts[-1] == "low"


def test_what_comes_back_does_not_let_newcomers_pass(ledger):
    """A job of a dead worker keeps its early turn; others' turns are counted from those that wait."""
    for i in range(6):
        add(ledger, f"a{i}", person="ann", batch=str(i))
    for _ in range(4):
        ledger.claim("w", 1)
    time.sleep(0.6)
    ledger.release_expired()  # four jobs come back
    for i in range(3):
        add(ledger, f"b{i}", person="bob")
    prompts = [job.parameters["prompt"] for job in ledger.queue()]
    assert prompts == ["a0", "a1", "a2", "a3", "a4", "b0", "a5", "b1", "b2"]


def test_saved_up_quota_is_not_there(ledger):
    """Images of a job that is tried again count as asked for now."""
    limits = Limits(1000, 1000, hourly=10)
    jobs = [add(ledger, keep=5, limits=limits).id for _ in range(2)]
    with pytest.raises(QueueFull):
        add(ledger, keep=5, limits=limits)
    for job in jobs:
        ledger.cancel(job)
        ledger.retry(job, limits)  # neither twice
    assert ledger.usage("me") == (2, 10)


def test_the_speed_of_workers_side_by_side_is_that_of_all(ledger):
    for name in ("one", "two"):
        add(ledger, batch=name, keep=4)
    claimed = {name: ledger.claim(name, 4)[0].id for name in ("one", "two")}
    time.sleep(0.4)
    for name, job in claimed.items():
        assert ledger.finish(name, job, [image(int(name == "two"))])
    speed = ledger.seconds_an_image()
    assert speed is not None
    assert 0.04 < speed < 0.09  # 0.4 s for 8 images


def test_a_paused_queue_begins_nothing(ledger):
    running, waiting = add(ledger).id, add(ledger).id
    ledger.claim("w", 1)
    ledger.pause(True)
    assert ledger.paused
    assert ledger.claim("w", 1) == []
    assert ledger.finish("w", running, [image()])
    ledger.pause(False)
    assert [job.id for job in ledger.claim("w", 1)] == [waiting]


def test_what_has_failed_or_was_canceled_can_be_tried_again(ledger):
    failed, canceled = add(ledger, batch="1").id, add(ledger, batch="2").id
    ledger.claim("w", 1)
    ledger.end("w", [failed], "failed", "no luck")
    ledger.cancel(canceled)
    for job in (failed, canceled):
        ledger.retry(job, ROOM)
        ledger.retry(job, ROOM)  # once more changes nothing
    found = ledger.get(failed)
    assert (found.state, found.error, found.attempts, found.finished) == ("queued", None, 0, None)
    for number, job in enumerate((failed, canceled)):
        assert [each.id for each in ledger.claim("w", 1)] == [job]
        assert ledger.finish("w", job, [image(number)])
    ledger.retry(failed, ROOM)
    assert ledger.get(failed).state == "succeeded"


def test_of_several_jobs_all_are_queued_or_none(ledger):
    jobs = [NewJob(parameters(str(i)), 1, "b") for i in range(4)]
    with pytest.raises(QueueFull):
        ledger.add("me", jobs, Limits(queued=1000, owned=3), person="me")
    assert ledger.queue() == []
    added = ledger.add("me", jobs, ROOM, person="me")
    assert [job.parameters["prompt"] for job in added] == ["0", "1", "2", "3"]
    assert [job.id for job in ledger.queue()] == [job.id for job in added]
    assert ledger.usage("me") == (4, 4)
