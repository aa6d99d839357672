"""What the routes share: the settings, the ledger, the library, the models; what a request may ask for.

No route draws; workers do.
"""

import asyncio
import gc
import hashlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote

from fastapi import Depends, Header, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field

from dalle_pytorch.checkpoints.loading import load_vae
from dalle_pytorch.distributed import find_device
from dalle_pytorch.errors import UserError
from dalle_pytorch.files import is_unicode, read_text
from dalle_pytorch.serving.codec import Codec
from dalle_pytorch.serving.config import ServeConfig
from dalle_pytorch.serving.engine import Draw
from dalle_pytorch.serving.keys import ANYONE, Keys
from dalle_pytorch.serving.ledger import (
    CANCELED,
    DONE,
    FAILED,
    QUEUED,
    SUCCEEDED,
    Conflict,
    Job,
    Ledger,
    Limits,
    NewJob,
    QueueFull,
    Row,
)
from dalle_pytorch.serving.library import Library
from dalle_pytorch.serving.similar import Similar
from dalle_pytorch.serving.worker import Worker

log = logging.getLogger(__name__)
MEASURED_EVERY = 2.0
POLL = 0.15
"""Seconds between two looks at the jobs that somebody waits for."""


class Completion(BaseModel):
    """An image to complete."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(pattern="^[0-9a-f]{32}$", description="id of an image of the library")
    rows: int = Field(ge=1, description="token rows that stay, from the top")


class DrawBody(BaseModel):
    """What to draw."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, examples=["a red apple"])
    n: int = Field(1, ge=1, description="images to keep, the best first")
    num_candidates: int | None = Field(None, ge=1, description="images to draw and rank; null = n")
    seed: int | None = Field(None, ge=0, lt=1 << 53, description="the same seed gives the same images; null = any")
    indices: list[Annotated[int, Field(ge=0, lt=1 << 31)]] | None = Field(
        None, min_length=1, description="draw these candidates only, as an image's row names them"
    )
    negative_prompt: str = ""
    complete: Completion | None = Field(None, description="keep the top of an image, and draw the rest anew")
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = Field(None, ge=0, lt=1 << 31)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    cfg_scale: float | None = Field(None, ge=-100, le=100)
    priority: int = Field(0, ge=-10, le=0, description="below 0: after the others")


class Part(NamedTuple):
    """A part of a prompt, and what it may be."""

    title: str
    choices: list[str]


def read_parts(file: str | None) -> list[Part]:
    """Parts of prompts: blocks of lines with an empty line between, the first line of each ``# title``.

    Raises:
        UserError: there is no such file, or a block without title or choices; names it.
    """
    if file is None:
        text = (resources.files("dalle_pytorch.serving") / "pages" / "inspiration.txt").read_text(encoding="utf-8")
    else:
        text = read_text(Path(file), f"inspiration={file}")
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        first, *choices = [line.strip() for line in block.splitlines()] or [""]
        if not first.startswith("#") or not choices:
            raise UserError(f"inspiration={file}: a block must be a line '# title' and a choice a line, got {first!r}")
        parts.append(Part(first.lstrip("# "), choices))
    return parts


class Watch:
    """Jobs that somebody waits for: one look at the ledger for all of them.

    Args:
        ledger: has the jobs.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.stopping = ledger, False
        self.task: asyncio.Task[None] | None = None
        self.waiting: dict[asyncio.Future[None], Job] = {}

    async def changed(self, job: Job, seconds: float = 1.0) -> bool:
        """Wait until the state or the progress of a job is another, at most for so long; whether it is.

        Raises:
            HTTPException: the server is being stopped.
        """
        if self.stopping:
            raise HTTPException(503, "the server is being stopped", headers={"Retry-After": "5"})
        future = asyncio.get_running_loop().create_future()
        self.waiting[future] = job
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._look())
        try:
            await asyncio.wait_for(future, seconds)
            return True
        except TimeoutError:
            return False
        finally:
            del self.waiting[future]

    async def _look(self) -> None:
        while self.waiting:
            await asyncio.sleep(POLL)
            waiting = dict(self.waiting)
            try:
                now = await run_in_threadpool(self.ledger.progress, {job.id for job in waiting.values()})
            except Exception:
                log.exception("the ledger does not answer")
                continue
            for future, job in waiting.items():
                if now.get(job.id) != (job.state, job.progress) and not future.done():
                    future.set_result(None)


class Hub:
    """What the routes share."""

    def __init__(self, config: ServeConfig, ledger: Ledger, library: Library, engine: Callable[[], Any]) -> None:
        self.config, self.ledger, self.library, self.make_engine = config, ledger, library, engine
        self.keys, self.watch = Keys(config.keys), Watch(ledger)
        self.parts = read_parts(config.inspiration)
        self.measured: tuple[float, float | None] = -MEASURED_EVERY, None
        self.engine: Any = None
        self.codec: Codec | None = None
        self.similar: Similar | None = None
        self.broken = False
        self.loading = threading.Lock()
        self.worker = Worker(ledger, library, self.load) if config.workers else None

    def stop(self) -> None:
        """End what waits, and let the worker give back what it draws."""
        self.watch.stopping = True
        if self.worker is not None:
            self.worker.stop()

    def load(self) -> Any:
        """The models of this process, loaded once; ready before the first job."""
        with self.loading:
            if self.engine is None:
                try:
                    engine = self.make_engine()
                    self.codec = Codec(self.codec_vae(engine), max_pixels=self.config.limits.pixels)
                    if engine.clip is not None:
                        self.similar = Similar(engine.clip, self.ledger, self.library)
                    self.engine = engine
                    gc.collect()
                    gc.freeze()  # or a full collection looks through all of torch, 0.2 s in which nobody is answered
                except Exception:
                    self.broken = True
                    raise
            return self.engine

    def codec_vae(self, engine: Any) -> Any:
        """The image tokenizer of the codec's routes."""
        if self.config.vae is None:
            return engine.vae
        return load_vae(self.config.vae, map_location=find_device(self.config.device))

    def loaded(self) -> Any:
        """The models.

        Raises:
            HTTPException: they cannot be loaded, or are not yet.
        """
        if self.broken:
            raise HTTPException(503, "the models cannot be loaded; the server's log says why")
        if self.worker is not None and self.worker.failure is not None:
            raise HTTPException(503, "the worker has given up; the server's log says why")
        if self.engine is None:
            raise HTTPException(503, "the models are being loaded", headers={"Retry-After": "5"})
        return self.engine

    @property
    def limits(self) -> Limits:
        """What may wait."""
        limits = self.config.limits
        return Limits(limits.queued, limits.owned, limits.hourly)

    def submit(
        self, bodies: Sequence[DrawBody], owner: str, *, person: str = "", key: str | None = None,
        asked: dict[str, Any] | None = None,
    ) -> list[Job]:  # fmt: skip
        """Check requests and queue all of them, or none.

        Args:
            bodies: what to draw.
            owner: whose jobs they are.
            person: who takes turns with others.
            key: a client's own, for one request.
            asked: a request in the words of another API, kept beside it.

        Raises:
            HTTPException: one cannot be drawn, or there is no room.
        """
        digest = digest_of(bodies[0].model_dump()) if key is not None else ""
        try:
            if key is not None and (known := self.ledger.of_key(owner, key, digest)) is not None:
                return [known]
        except Conflict as error:
            raise HTTPException(409, "this Idempotency-Key belongs to another request") from error
        requests, limits = [self.new_job(body, owner) for body in bodies], self.config.limits
        images = sum(request.count for request in requests)
        if limits.hourly is not None and images > limits.hourly:
            raise HTTPException(422, f"{images} images at once, {limits.hourly} an hour at most")
        if asked is not None:
            requests = [job._replace(parameters={**job.parameters, "asked": asked}) for job in requests]
        try:
            return self.ledger.add(owner, requests, self.limits, person=person or owner, key=key, digest=digest)
        except QueueFull as error:
            raise full(error) from error
        except Conflict as error:
            raise HTTPException(409, "this Idempotency-Key belongs to another request") from error

    def new_job(self, body: DrawBody, owner: str) -> NewJob:
        """Check a request.

        Raises:
            HTTPException: it cannot be drawn.
        """
        if body.indices is not None and body.model_fields_set & {"n", "num_candidates"}:
            raise HTTPException(
                422, "indices say which images are drawn, all of which are kept: leave n and num_candidates out"
            )
        limits, names = self.config.limits, ("temperature", "top_k", "top_p", "min_p", "cfg_scale")
        for text in (body.prompt, body.negative_prompt):
            if len(text) > limits.prompt:
                raise HTTPException(422, f"a prompt has {limits.prompt} characters at most")
            if "\0" in text or not is_unicode(text):
                raise HTTPException(422, "a prompt holds a character that is no text")
        count = (body.num_candidates or body.n) if body.indices is None else len(body.indices)
        if count > limits.images:
            raise HTTPException(422, f"a job draws {limits.images} images at most, got {count}")
        indices = list(range(count)) if body.indices is None else body.indices
        if len(set(indices)) < count:
            raise HTTPException(422, "indices must be different numbers")
        keep = len(indices) if body.indices is not None else body.n
        if keep > len(indices):
            raise HTTPException(422, f"n ({keep}) must not be above num_candidates ({len(indices)})")
        seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed
        changed = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
        try:
            sampling = replace(self.config.sampling, **changed)
            request = Draw(
                prompt=body.prompt, seed=seed, indices=tuple(indices), keep=keep, sampling=sampling,
                negative_prompt=body.negative_prompt, keep_rows=0 if body.complete is None else body.complete.rows,
            )  # fmt: skip
            self.loaded().check(request)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        parameters = {
            "prompt": body.prompt, "seed": seed, "indices": indices, "keep": keep, "sampling": asdict(sampling),
            "negative_prompt": body.negative_prompt,
        }  # fmt: skip
        alike = {key: value for key, value in parameters.items() if key not in ("prompt", "seed")}
        if body.complete is not None:
            try:
                self.ledger.image(body.complete.image, owner)
            except KeyError as error:
                raise HTTPException(404, "no such image to complete") from error
            parameters["complete"], alike["rows"] = body.complete.model_dump(), body.complete.rows
        return NewJob(parameters, len(indices), digest_of(alike), body.priority)

    def seconds_an_image(self) -> float | None:
        """As the ledger has measured it, some seconds ago at most: it looks at many jobs for that."""
        now = time.monotonic()
        if now > self.measured[0] + MEASURED_EVERY:
            self.measured = now, self.ledger.seconds_an_image()
        return self.measured[1]

    def may_pause(self, owner: str) -> bool:
        """Whether somebody may pause the queue: those that ``admins`` names, or all where no keys are asked for."""
        return self.config.keys is None or owner in self.config.admins

    def retry(self, job: Job) -> None:
        """Queue a job again that has failed or was canceled.

        Raises:
            HTTPException: there is no room.
        """
        if job.state not in (FAILED, CANCELED):
            raise HTTPException(409, f"only a failed or canceled job can be tried again; this one is {job.state}")
        try:
            self.ledger.retry(job.id, self.limits)
        except QueueFull as error:
            raise full(error) from error

    def get(self, job: str, owner: str) -> Job:
        """A job of an owner.

        Raises:
            HTTPException: there is none.
        """
        try:
            return self.ledger.get(job, owner)
        except KeyError as error:
            raise HTTPException(404, "no such job") from error

    def preview(self, job: Job) -> bytes | None:
        """The images of a running job as far as they are; the worker makes them from now on, if it has not yet."""
        if job.state in DONE:
            return None
        self.ledger.want_preview(job.id)
        return self.ledger.preview(job.id)

    def delete(self, image: str) -> None:
        """Delete an image for good."""
        self.ledger.forget(image)
        self.library.delete(image)

    def file(self, image: str) -> FileResponse:
        """The file of an image.

        Raises:
            HTTPException: it is gone.
        """
        path = self.library.path(image)
        if not path.is_file():
            raise HTTPException(410, "the file of this image is gone")
        return FileResponse(path, media_type="image/png", headers={"Cache-Control": "private, max-age=31536000"})

    def view(self, job: Job) -> dict[str, Any]:
        """A job as clients see it."""
        shown: dict[str, Any] = {
            "id": job.id, "person": job.person, "state": job.state, "prompt": job.parameters["prompt"],
            "seed": job.parameters["seed"], "parameters": job.parameters, "progress": round(job.progress, 3),
            "error": job.error, "created": job.created, "started": job.started, "finished": job.finished,
        }  # fmt: skip
        if job.state == QUEUED:
            ahead, speed = self.ledger.ahead(job.id), self.seconds_an_image()
            shown["position"] = ahead.jobs
            shown["eta_seconds"] = (
                None if speed is None or self.ledger.paused else round((ahead.images + job.count) * speed, 1)
            )
        if job.state == SUCCEEDED:
            shown["images"] = [image_view(row) for row in self.images(job)]
        return shown

    def images(self, job: Job) -> list[Row]:
        """All images of a job, the best first."""
        return self.ledger.images(job.owner, job=job.id, limit=job.count)


def full(error: QueueFull) -> HTTPException:
    """What a client hears where there is no room."""
    return HTTPException(429, str(error), headers={"Retry-After": str(error.retry_after)})


def digest_of(values: dict[str, Any]) -> str:
    """A short text that stands for some values: equal ones have the same."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def image_view(row: Any) -> dict[str, Any]:
    """An image as clients see it; ``seconds`` are those of its job, which has drawn ``drawn`` images."""
    names = ("id", "job", "place", "prompt", "seed", "index", "score", "model", "created")
    drawn = len(row["parameters"]["indices"])
    seconds = round((row["finished"] or 0) - (row["started"] or 0), 2)
    shown = {name: row[name] for name in names}
    return {**shown, "seconds": seconds, "drawn": drawn, "url": f"/v1/images/{row['id']}.png"}


def owner_of(request: Request, key: Annotated[Any, Depends(HTTPBearer(auto_error=False))] = None) -> str:
    """Whose request it is, which ``Guard`` has found out; ``key`` is there for the description of the API."""
    return request.state.owner


Owner = Annotated[str, Depends(owner_of)]


def person_of(owner: Owner, x_name: Annotated[str, Header(max_length=1200)] = "") -> str:
    """Who takes turns with others: the owner of the key, or on a server without keys the name that somebody gives in
    the header ``X-Name``, percent-encoded."""
    name = unquote(x_name).strip()[:100]
    return name if owner == ANYONE and name and is_unicode(name) and "\0" not in name else owner


Person = Annotated[str, Depends(person_of)]
