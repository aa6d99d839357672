"""A worker: claims jobs, draws them, and says how far they are. A thread of the server, or a process of its own."""

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from typing import Any

import torch
from sqlalchemy.exc import SQLAlchemyError

from dalle_pytorch.errors import UserError, first_line
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.serving.engine import Draw, Drawn, Engine, MakeEngine, Step
from dalle_pytorch.serving.ledger import CANCELED, FAILED, Job, Ledger, NewImage
from dalle_pytorch.serving.library import Library

log = logging.getLogger(__name__)
NOTED_EVERY = 0.3
"""Seconds between two notes of a worker's jobs: each is a write to the database, and a preview takes time to decode."""


MAX_DEFECTS = 5
"""Failed batches in a row after which a worker gives up: its device is broken, and would empty the queue."""


def request_of(parameters: dict[str, Any], library: Library) -> Draw:
    """What a job asks for.

    Raises:
        UserError: an image that it completes is gone.
    """
    image, complete = None, parameters.get("complete")
    if complete is not None:
        try:
            image = library.open(complete["image"])
        except (OSError, KeyError) as error:
            raise UserError(f"the image {complete['image']}, which this job completes, is gone") from error
    return Draw(
        prompt=parameters["prompt"],
        seed=parameters["seed"],
        indices=tuple(parameters["indices"]),
        keep=parameters["keep"],
        sampling=SamplingConfig(**parameters["sampling"]),
        negative_prompt=parameters.get("negative_prompt", ""),
        image=image,
        keep_rows=0 if complete is None else complete["rows"],
    )


class Worker:
    """Works off the ledger until it is stopped.

    Args:
        ledger: where jobs are.
        library: where images go.
        make_engine: loads the models, once, before the first job.
    """

    def __init__(self, ledger: Ledger, library: Library, make_engine: MakeEngine) -> None:
        self.ledger, self.library, self.make_engine = ledger, library, make_engine
        self.name = f"{socket.gethostname()[:16]}-{os.getpid()}-{secrets.token_hex(4)}"
        self.stopping, self.ended = threading.Event(), threading.Event()
        self.held: list[str] = []
        self.lost: set[str] = set()
        self.watched: set[str] = set()
        self.defects = 0
        """Batches in a row that have failed for no fault of a request."""
        self.failure: str | None = None
        """Why this worker has given up: its models cannot be loaded, or its device fails at every job."""

    def run(self) -> None:
        """Load the models, then work until ``stop``; what runs then is queued again."""
        try:
            engine = self.make_engine()
        except Exception as error:
            self.failure = f"the models cannot be loaded: {first_line(error)}"
            log.exception("the models cannot be loaded")
            return
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        while not self.stopping.is_set() and self.failure is None:
            try:
                if jobs := self.ledger.claim(self.name, engine.together):
                    self.work(engine, jobs)
                else:
                    self.stopping.wait(0.1)
            except Exception:  # the database is away; what was held is claimed again when its lease is over
                log.exception("worker: trying again in a second")
                self.stopping.wait(1)
        self.ended.set()
        heart.join()

    def stop(self) -> None:
        """Give back what runs, and take nothing more."""
        self.stopping.set()

    def work(self, engine: Engine, jobs: list[Job]) -> None:
        """Draw jobs of one batch; each ends succeeded, failed, canceled, or is given back.

        Raises:
            SQLAlchemyError: the database does not answer; the jobs stay held until their lease is over.
        """
        self.lost, self.watched, self.held = set(), set(), [job.id for job in jobs]
        noted, open_jobs = dict.fromkeys(range(len(jobs)), 0.0), dict(enumerate(jobs))
        try:
            with contextlib.closing(engine.draw([request_of(job.parameters, self.library) for job in jobs])) as events:
                for event in events:
                    for number in [n for n, job in open_jobs.items() if job.id in self.lost]:
                        self.ledger.end(self.name, [open_jobs.pop(number).id], CANCELED)
                    if self.stopping.is_set() or not open_jobs:
                        break
                    if event.number not in open_jobs:
                        continue
                    if isinstance(event, Drawn):
                        self.finish(engine, open_jobs[event.number], event)
                        del open_jobs[event.number]
                    elif time.monotonic() - noted[event.number] > NOTED_EVERY * len(open_jobs):
                        noted[event.number] = time.monotonic()
                        self.note(open_jobs[event.number], event)
            self.defects = 0
            if open_jobs:
                self.ledger.give_back(self.name, [job.id for job in open_jobs.values()])
        except SQLAlchemyError:
            raise
        except Exception as error:
            self.failed(error, list(open_jobs.values()), alone=len(jobs) == 1)
        finally:
            self.held = []

    def failed(self, error: Exception, jobs: list[Job], *, alone: bool) -> None:
        """End a job that cannot be drawn; of a batch draw each alone, since only one of them may be to blame.

        Args:
            error: why.
            jobs: those of the batch that have no images yet.
            alone: whether the batch was one job.
        """
        log.error("jobs %s failed", [job.id for job in jobs], exc_info=error)
        names = [job.id for job in jobs]
        self.defects += not isinstance(error, UserError)
        if self.defects >= MAX_DEFECTS or isinstance(error, torch.AcceleratorError):
            self.failure = f"{type(error).__name__} at every job; restart this worker"
            self.ledger.give_back(self.name, names)
        elif not alone:
            self.ledger.give_back(self.name, names, apart=True)
        else:
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: a defect, see the log"
            if isinstance(error, torch.OutOfMemoryError):
                told = "out of memory, even with one image at a time"
            self.ledger.end(self.name, names, FAILED, told)

    def note(self, job: Job, event: Step) -> None:
        """Say how far a job is; a job does not fail because that cannot be said."""
        try:
            preview = event.preview() if job.id in self.watched else None
            self.ledger.note(self.name, job.id, event.progress, preview)
        except Exception:
            log.exception("no preview of job %s", job.id)

    def finish(self, engine: Engine, job: Job, drawn: Drawn) -> None:
        """Write the images of a job, then note them and its end in one transaction."""
        rows, asked = [], job.parameters
        for place, (image, index, score) in enumerate(drawn.images):
            new = NewImage("", place, asked["prompt"], asked["seed"], index, score, engine.model, asked)
            notes = {**new._asdict(), "job": job.id, "owner": job.owner, "created": job.created}
            rows.append(new._replace(id=self.library.add(image, notes)))
        if not self.ledger.finish(self.name, job.id, rows):  # canceled meanwhile, or another worker's
            for row in rows:
                self.library.delete(row.id)
            self.ledger.end(self.name, [job.id], CANCELED)

    def _beat(self) -> None:
        """Renew leases while the models work, which may take longer than one lasts."""
        while not self.ended.wait(min(self.ledger.lease / 4, 0.5)):
            if held := self.held:
                try:
                    beat = self.ledger.beat(self.name, held)
                    if self.held is held:  # otherwise what was lost belongs to the batch before
                        self.lost |= beat.lost
                        self.watched = beat.watched
                except Exception:
                    log.exception("heartbeat")
