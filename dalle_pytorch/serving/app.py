"""The server: routes over the ledger, the library and the codec. No route draws; workers do.

Nothing here builds a path, an URL to fetch or HTML from what a client sends: images have ids that the server has made,
pages are static files.
"""

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import logging
import secrets
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle_pytorch.checkpoints.loading import load_vae
from dalle_pytorch.distributed import find_device
from dalle_pytorch.errors import UserError
from dalle_pytorch.files import is_unicode
from dalle_pytorch.serving.codec import Codec
from dalle_pytorch.serving.codec import routes as codec_routes
from dalle_pytorch.serving.config import ServeConfig
from dalle_pytorch.serving.engine import Draw, LocalEngine
from dalle_pytorch.serving.keys import Keys
from dalle_pytorch.serving.ledger import DONE, QUEUED, RUNNING, SUCCEEDED, Conflict, Job, Ledger, QueueFull
from dalle_pytorch.serving.library import Library
from dalle_pytorch.serving.similar import Similar
from dalle_pytorch.serving.worker import Worker

log = logging.getLogger(__name__)
POLL = 0.15
"""Seconds between two looks at the jobs that somebody waits for."""
SECURE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


Before = Annotated[str | None, Query(pattern="^[0-9a-f]{32}$", description="id of the last one of the page before")]


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


class ImagesBody(BaseModel):
    """OpenAI's request for images, and as extras what it has no names for."""

    model_config = ConfigDict(extra="ignore")  # clients send fields that mean nothing here: model, user, quality

    prompt: str = Field(min_length=1, examples=["a red apple"])
    n: int | None = Field(1, ge=1)
    size: str | None = "auto"
    response_format: Literal["url", "b64_json"] | None = "b64_json"
    output_format: Literal["png"] | None = "png"
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3)
    num_candidates: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0, lt=1 << 53)
    cfg_scale: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    temperature: float | None = None


NO_KEY = "no key, or one that is not known"
PRIVATE = ("/v1/", "/encode", "/decode", "/compare", "/metrics")
"""What paths begin with that need a key, where there are any."""


class Watch:
    """Jobs that somebody waits for: one look at the ledger for all of them.

    Args:
        ledger: has the jobs.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.task, self.stopping = ledger, None, False
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

    def submit(self, body: DrawBody, owner: str, idempotency: str | None = None) -> Job:
        """Check a request and queue it.

        Raises:
            HTTPException: it cannot be drawn, or there is no room.
        """
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
        try:
            return self.ledger.add(
                owner, "draw", parameters, count=len(indices), batch=digest_of(alike), priority=body.priority,
                idempotency=idempotency, request=digest_of(body.model_dump()), max_queued=limits.queued,
                max_owned=limits.owned, max_hourly=limits.hourly,
            )  # fmt: skip
        except QueueFull as error:
            raise HTTPException(429, str(error), headers={"Retry-After": str(error.retry_after)}) from error
        except Conflict as error:
            raise HTTPException(409, "this Idempotency-Key belongs to another request") from error

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

    def view(self, job: Job, owner: str) -> dict[str, Any]:
        """A job as clients see it."""
        shown: dict[str, Any] = {
            "id": job.id, "state": job.state, "prompt": job.parameters["prompt"], "seed": job.parameters["seed"],
            "parameters": job.parameters, "progress": round(job.progress, 3), "error": job.error,
            "created": job.created, "started": job.started, "finished": job.finished,
        }  # fmt: skip
        if job.state == QUEUED:
            shown["position"] = self.ledger.position(job.id)
        if job.state == SUCCEEDED:
            shown["images"] = [image_view(row) for row in self.ledger.images(owner, job=job.id, limit=1000)]
        return shown


def digest_of(values: dict[str, Any]) -> str:
    """A short text that stands for some values: equal ones have the same."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def image_view(row: Any) -> dict[str, Any]:
    """An image as clients see it."""
    names = ("id", "job", "place", "prompt", "seed", "index", "score", "model", "created")
    return {**{name: row[name] for name in names}, "url": f"/v1/images/{row['id']}.png"}


def make_app(config: ServeConfig, engine: Callable[[], Any] | None = None) -> FastAPI:
    """The server.

    Args:
        config: its settings.
        engine: makes what draws; None = the models that ``config`` names.

    Raises:
        UserError: the ledger cannot be opened, or the file of keys cannot be read.
    """
    library = Library(Path(config.library))
    hub = Hub(config, Ledger(config.database_url(), lease=config.lease), library, engine or local_engine(config))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        work = hub.worker.run if hub.worker is not None else hub.load
        thread = threading.Thread(target=work, name="worker", daemon=True)
        thread.start()
        stopping = threading.Event()

        def reap() -> None:
            """Queue the jobs of dead workers again, also while no worker is there to do so."""
            while not stopping.wait(config.lease / 3):
                try:
                    hub.ledger.release_expired()
                except Exception:
                    log.exception("the ledger does not answer")

        threading.Thread(target=reap, name="reaper", daemon=True).start()
        yield
        stopping.set()
        hub.stop()
        if hub.worker is not None:
            await run_in_threadpool(thread.join, 10)
        hub.ledger.close()

    app = FastAPI(
        title="dalle_pytorch", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        max_body_size=int(config.limits.body_mb * 1e6),
    )  # fmt: skip
    app.state.hub = hub
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts_of(config), www_redirect=False)
    app.add_middleware(Guard, keys=hub.keys, origins=config.origins)  # the outermost: its headers are on every answer
    app.add_exception_handler(StarletteHTTPException, told)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, defect)
    app.include_router(job_routes(hub))
    app.include_router(image_routes(hub))
    app.include_router(openai_routes(hub))
    app.include_router(codec_routes(lambda: (hub.loaded(), hub.codec)[1]), dependencies=[Depends(owner_of)])
    app.include_router(health_routes(hub))
    app.mount("/", StaticFiles(directory=str(resources.files("dalle_pytorch.serving") / "pages"), html=True))
    return app


def local_engine(config: ServeConfig) -> Callable[[], LocalEngine]:
    """Loads the models that the settings name."""
    return lambda: LocalEngine(
        config.weights, config.clip, device=find_device(config.device), precision=config.precision,
        memory_gb=config.memory_gb, together=config.together,
    )  # fmt: skip


def hosts_of(config: ServeConfig) -> list[str]:
    """Names by which the server may be asked."""
    return [*dict.fromkeys([config.host.strip("[]"), "127.0.0.1", "localhost", "[::1]", *config.names])]


class Guard:
    """Headers of every answer, and refusal of requests that another site's page makes in somebody's browser."""

    def __init__(self, app: ASGIApp, keys: Keys, origins: list[str]) -> None:
        self.app, self.keys, self.origins = app, keys, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        origin, own = request.headers.get("origin"), f"{request.url.scheme}://{request.headers.get('host', '')}"
        foreign = origin is not None and origin != own
        listed = origin in self.origins
        cors = {"access-control-allow-origin": str(origin), "vary": "origin"} if foreign and listed else {}
        if foreign and not listed and request.method not in ("GET", "HEAD"):
            await error_answer(403, "requests from pages of other sites are not taken")(scope, receive, send)
            return
        if request.method == "OPTIONS":
            allowed = {"access-control-allow-methods": "GET, POST, DELETE", "access-control-allow-headers":
                       "authorization, content-type, idempotency-key"}  # fmt: skip
            await Response(status_code=204, headers={**cors, **(allowed if cors else {})})(scope, receive, send)
            return

        if request.url.path.startswith(PRIVATE):  # before the body is read
            request.state.owner = self.keys.owner(request.headers.get("authorization"))
            if request.state.owner is None:
                await error_answer(401, NO_KEY, {"WWW-Authenticate": "Bearer", **SECURE, **cors})(scope, receive, send)
                return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = {**SECURE, **cors}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
            await send(message)

        await self.app(scope, receive, answer)


def error_answer(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


async def told(request: Request, error: Any) -> Response:
    """Answer what a route refuses."""
    return error_answer(error.status_code, str(error.detail), error.headers)


async def invalid(request: Request, error: Any) -> Response:
    """Answer a request that does not fit its schema: 400 where the file is missing, else 422."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    status = 400 if first["type"] == "missing" and first["loc"][0] == "body" and where == "file" else 422
    return error_answer(status, f"{where}: {first['msg']}" if where else str(first["msg"]))


async def defect(request: Request, error: Exception) -> Response:
    """Answer without internals; the log has the traceback."""
    return error_answer(500, "a defect of the server; its log has the traceback")


def owner_of(request: Request, key: Annotated[Any, Depends(HTTPBearer(auto_error=False))] = None) -> str:
    """Whose request it is, which ``Guard`` has found out; ``key`` is there for the description of the API."""
    return request.state.owner


Owner = Annotated[str, Depends(owner_of)]


def job_routes(hub: Hub) -> APIRouter:
    """Jobs of API v1."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    @router.post("", status_code=202)
    def submit(
        body: DrawBody, owner: Owner, idempotency_key: Annotated[str | None, Header(max_length=200)] = None
    ) -> dict[str, Any]:
        """Queue a job."""
        return hub.view(hub.submit(body, owner, idempotency_key), owner)

    @router.get("")
    def jobs(
        owner: Owner, limit: Annotated[int, Query(ge=1, le=200)] = 50, before: Before = None,
        state: Annotated[list[str] | None, Query()] = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The latest jobs, newest first; with `before` those that came before that job."""
        found = hub.ledger.jobs(owner, states=state or (), limit=limit, before=before)
        return {"jobs": [hub.view(job, owner) for job in found], "seconds_an_image": hub.ledger.seconds_an_image()}

    @router.get("/{job}")
    def one(job: str, owner: Owner) -> dict[str, Any]:
        """A job, with its images once it has succeeded."""
        return hub.view(hub.get(job, owner), owner)

    @router.delete("/{job}")
    def cancel(job: str, owner: Owner) -> dict[str, Any]:
        """Cancel a job that waits or runs; one that has ended stays as it is."""
        hub.ledger.cancel(hub.get(job, owner).id)
        return hub.view(hub.get(job, owner), owner)

    @router.get("/{job}/preview.png", response_class=Response, responses={204: {"description": "none yet"}})
    def preview(job: str, owner: Owner) -> Response:
        """The images of a running job as far as they are, side by side; made from the first time on that one asks."""
        found = hub.preview(hub.get(job, owner))
        if found is None:
            return Response(status_code=204)
        return Response(found, media_type="image/png", headers={"Cache-Control": "no-store"})

    @router.get("/{job}/images.zip", response_class=Response)
    def archive(job: str, owner: Owner) -> Response:
        """All images of a job."""
        file, rows = io.BytesIO(), hub.ledger.images(owner, job=hub.get(job, owner).id, limit=1000)
        with zipfile.ZipFile(file, "w") as packed:
            for row in rows:
                with contextlib.suppress(FileNotFoundError):
                    packed.write(hub.library.path(row["id"]), f"{row['place']:03d}_{row['id']}.png")
        name = f'attachment; filename="{job}.zip"'
        return Response(file.getvalue(), media_type="application/zip", headers={"Content-Disposition": name})

    @router.get("/{job}/events")
    async def events(job: str, owner: Owner) -> StreamingResponse:
        """Server-sent events: the job whenever it changes, up to its end; `preview` where there is a new one."""
        first = await run_in_threadpool(hub.get, job, owner)

        async def stream() -> AsyncIterator[str]:
            found, last, shown, asked = first, "", 0.0, time.monotonic()
            while True:
                view = await run_in_threadpool(hub.view, found, owner)
                text = json.dumps(view)
                if text != last:
                    yield f"event: {found.state}\ndata: {text}\n\n"
                    last, asked = text, time.monotonic()
                if found.state == RUNNING and found.progress > shown:
                    shown = found.progress
                    if await run_in_threadpool(hub.preview, found) is not None:
                        yield f"event: preview\ndata: {json.dumps({'url': f'/v1/jobs/{job}/preview.png?{shown}'})}\n\n"
                if found.state in DONE:
                    return
                if hub.watch.stopping:
                    return
                if time.monotonic() - asked > 10:  # proxies close what is silent
                    yield ": waiting\n\n"
                    asked = time.monotonic()
                await hub.watch.changed(found)
                found = await run_in_threadpool(hub.get, job, owner)

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return router


def image_routes(hub: Hub) -> APIRouter:
    """The library of API v1."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    def mine(image: str, owner: str) -> Any:
        try:
            return hub.ledger.image(image, owner)
        except KeyError as error:
            raise HTTPException(404, "no such image") from error

    @router.get("")
    def images(
        owner: Owner, search: Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")] = "",
        limit: Annotated[int, Query(ge=1, le=200)] = 50, before: Before = None,
        similar: Annotated[str | None, Query(max_length=200, min_length=1, pattern=r"^[^\x00]*$")] = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Images, the newest job's first; `search` finds words of the prompt, `before` goes on after an image.

        `similar` gives the images that look most like some words instead, by the CLIP that ranks. Where `complete` is
        false not all of the library was compared yet: ask again.
        """
        if similar is None:
            rows = hub.ledger.images(owner, text=search, limit=limit, before=before)
            return {"images": [image_view(row) for row in rows]}
        if search or before is not None:
            raise HTTPException(422, "similar stands alone: leave search and before out")
        hub.loaded()
        if hub.similar is None:
            raise HTTPException(422, "similar needs a CLIP, and this server has none: start it with clip=")
        found = hub.similar.find(similar, owner, limit)
        return {"images": [{**image_view(row), "cosine": c} for row, c in found.rows], "complete": found.complete}

    @router.get("/{image}.png", response_class=FileResponse)
    def file(image: str, owner: Owner) -> FileResponse:
        """An image; its file holds prompt, seed, index and settings."""
        path = hub.library.path(mine(image, owner)["id"])
        if not path.is_file():
            raise HTTPException(410, "the file of this image is gone")
        return FileResponse(path, media_type="image/png", headers={"Cache-Control": "private, max-age=31536000"})

    @router.get("/{image}")
    def row(image: str, owner: Owner) -> dict[str, Any]:
        """An image's row, with all that draws it again."""
        found = mine(image, owner)
        return {**image_view(found), "parameters": found["parameters"]}

    @router.delete("/{image}", status_code=204)
    def delete(image: str, owner: Owner) -> None:
        """Delete an image for good."""
        found = mine(image, owner)
        hub.ledger.forget(found["id"])
        hub.library.delete(found["id"])

    return router


def openai_routes(hub: Hub) -> APIRouter:
    """OpenAI's images API."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post("/images/generations")
    async def generations(
        body: ImagesBody, request: Request, owner: Owner, prefer: Annotated[str, Header()] = ""
    ) -> Response:
        """Images of a prompt, answered when they are drawn. Extras: seed, num_candidates, cfg_scale, top_k, top_p.

        With the header `Prefer: respond-async` (RFC 7240) the answer is 202 and the job, which goes on by itself.
        """
        side = hub.loaded().image_size
        if body.size not in (None, "auto", f"{side}x{side}"):
            raise HTTPException(
                400, f"size must be auto or {side}x{side}, which this model draws; got {str(body.size)[:20]}"
            )
        names = ("prompt", "n", "num_candidates", "seed", "cfg_scale", "top_k", "top_p", "temperature")
        try:
            wanted = DrawBody(**{name: getattr(body, name) for name in names if getattr(body, name) is not None})
        except ValidationError as error:
            first = error.errors()[0]
            raise HTTPException(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        job = await run_in_threadpool(hub.submit, wanted, owner)
        if "respond-async" in (part.strip().lower() for part in prefer.split(",")):
            headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
            return JSONResponse(await run_in_threadpool(hub.view, job, owner), 202, headers)
        if body.stream:
            events = partial_events(hub, job, owner, body.partial_images or 0)
            return StreamingResponse(events, media_type="text/event-stream")
        try:
            while job.state not in DONE:
                if await request.is_disconnected():
                    return Response(status_code=499)
                if await hub.watch.changed(job):
                    job = await run_in_threadpool(hub.ledger.get, job.id)
        finally:
            if job.state not in DONE:  # the client is gone
                await give_up(hub, job)
        if job.state != SUCCEEDED:  # OpenAI's client would ask again, and draw it twice more
            no_retry = {"x-should-retry": "false"}
            raise HTTPException(500 if job.error else 409, job.error or "the job was canceled", headers=no_retry)
        rows = await run_in_threadpool(lambda: hub.ledger.images(owner, job=job.id, limit=1000))
        if body.response_format == "url":
            data = [{"url": f"{str(request.base_url).rstrip('/')}/v1/images/{row['id']}.png"} for row in rows]
        else:
            data = await run_in_threadpool(lambda: [{"b64_json": base64_of(hub, row["id"])} for row in rows])
        return JSONResponse({"created": int(job.created), "data": data, "seed": job.parameters["seed"]})

    return router


async def give_up(hub: Hub, job: Job) -> None:
    """Cancel a job whose client is gone, though the request that waits for it is being ended."""
    with anyio.CancelScope(shield=True):
        await run_in_threadpool(hub.ledger.cancel, job.id)


async def partial_events(hub: Hub, job: Job, owner: str, wanted: int) -> AsyncIterator[str]:
    """OpenAI's events of a job: previews, and each finished image."""
    sent, done = 0, False
    try:
        while True:
            job = await run_in_threadpool(hub.ledger.get, job.id)
            if job.state in DONE:
                break
            if sent < wanted:
                preview = await run_in_threadpool(hub.preview, job)
                if preview is not None and job.progress >= (sent + 1) / (wanted + 1):
                    kind = "image_generation.partial_image"
                    text = base64.b64encode(preview).decode()
                    yield event(kind, {"type": kind, "partial_image_index": sent, "b64_json": text})
                    sent += 1
            if hub.watch.stopping:
                return
            await hub.watch.changed(job)
        done = True
        if job.state != SUCCEEDED:
            yield event("error", {"type": "error", "error": {"message": job.error or "the job was canceled"}})
            return
        kind = "image_generation.completed"
        for row in await run_in_threadpool(lambda: hub.ledger.images(owner, job=job.id, limit=1000)):
            text = await run_in_threadpool(base64_of, hub, row["id"])
            yield event(kind, {"type": kind, "b64_json": text, "created_at": int(job.created)})
    finally:
        if not done:
            await give_up(hub, job)


def event(kind: str, content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n"


def base64_of(hub: Hub, image: str) -> str:
    """The file of an image as text."""
    return base64.b64encode(hub.library.path(image).read_bytes()).decode()


def health_routes(hub: Hub) -> APIRouter:
    """What a supervisor asks."""
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The server answers."""
        return {"status": "ok"}

    @router.get("/readyz")
    def readyz() -> dict[str, Any]:
        """The models are loaded and the ledger answers."""
        engine = hub.loaded()
        hub.ledger.counts()
        limits = {"images": hub.config.limits.images, "prompt": hub.config.limits.prompt}
        return {
            "status": "ready", "model": engine.model, "image_size": engine.image_size,
            "grid_size": engine.vae.grid_size, "limits": limits,
        }  # fmt: skip

    @router.get("/metrics", response_class=Response)
    def metrics(owner: Owner) -> Response:
        """Prometheus' text."""
        registry = CollectorRegistry()
        jobs = Gauge("dalle_jobs", "Jobs in each state", ["state"], registry=registry)
        counts = hub.ledger.counts()
        for state in (QUEUED, RUNNING, *DONE):
            jobs.labels(state).set(counts.get(state, 0))
        speed = Gauge("dalle_seconds_an_image", "Measured over the last jobs", registry=registry)
        speed.set(hub.ledger.seconds_an_image() or 0)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
