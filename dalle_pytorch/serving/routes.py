"""API v1: jobs, images, OpenAI's images; and what a supervisor asks."""

import base64
import contextlib
import csv
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, File, Header, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle_pytorch.serving.hub import DrawBody, Hub, Owner, Person, image_view
from dalle_pytorch.serving.ledger import DONE, QUEUED, RUNNING, SUCCEEDED, Cursor, Job

State = Literal["queued", "running", "succeeded", "failed", "canceled"]
NUMBER = r"-?\d+(?:\.\d+)?"
Place = Annotated[
    str | None, Query(pattern=f"^{NUMBER}(_\\d{{1,18}}){{3}}$", max_length=100, description="`next` of the page before")
]
LIST = "UTF-8 text with a prompt a line, or CSV with a column prompt and others named as in POST /v1/jobs"
Before = Annotated[str | None, Query(pattern="^[0-9a-f]{32}$", description="id of the last one of the page before")]


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


def job_routes(hub: Hub) -> APIRouter:
    """Jobs of API v1."""
    router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

    @router.post("", status_code=202)
    def submit(
        body: DrawBody, owner: Owner, person: Person,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Queue a job."""
        (job,) = hub.submit([body], owner, person=person, key=idempotency_key)
        return hub.view(job)

    @router.post("/batch", status_code=202)
    def batch(file: Annotated[bytes, File(description=LIST)], owner: Owner, person: Person) -> dict[str, Any]:
        """Queue a job for each line of a file, all of them or none."""
        limits = hub.config.limits
        jobs = hub.submit(requests_of(file, min(limits.owned, limits.queued)), owner, person=person)
        return {"jobs": [job.id for job in jobs]}

    @router.post("/{job}/retry", status_code=202)
    def retry(job: str, owner: Owner) -> dict[str, Any]:
        """Queue a job again that has failed or was canceled."""
        hub.retry(hub.get(job, owner))
        return hub.view(hub.get(job, owner))

    @router.get("")
    def jobs(
        owner: Owner, limit: Annotated[int, Query(ge=1, le=200)] = 50, before: Before = None,
        state: Annotated[list[State] | None, Query()] = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The latest jobs, newest first; with `before` those that came before that job."""
        if before is not None:
            hub.get(before, owner)
        found = hub.ledger.jobs(owner, states=state or (), limit=limit, before=before)
        return {"jobs": [hub.view(job) for job in found], "seconds_an_image": hub.seconds_an_image()}

    @router.get("/{job}")
    def one(job: str, owner: Owner) -> dict[str, Any]:
        """A job, with its images once it has succeeded."""
        return hub.view(hub.get(job, owner))

    @router.delete("/{job}")
    def cancel(job: str, owner: Owner) -> dict[str, Any]:
        """Cancel a job that waits or runs; one that has ended stays as it is."""
        hub.ledger.cancel(hub.get(job, owner).id)
        return hub.view(hub.get(job, owner))

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
        found = hub.get(job, owner)
        if found.state != SUCCEEDED:
            raise HTTPException(409, "the job has no images: it has not succeeded, or not yet")
        file, rows = io.BytesIO(), hub.images(found)
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
                view = await run_in_threadpool(hub.view, found)
                text = json.dumps(view)
                if text != last:
                    yield f"event: {found.state}\ndata: {text}\n\n"
                    last, asked = text, time.monotonic()
                if found.state == RUNNING and found.progress > shown:
                    shown = found.progress
                    if await run_in_threadpool(hub.preview, found) is not None:
                        yield f"event: preview\ndata: {json.dumps({'url': f'/v1/jobs/{job}/preview.png?{shown}'})}\n\n"
                if found.state in DONE or hub.watch.stopping:
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
        limit: Annotated[int, Query(ge=1, le=200)] = 50, before: Place = None,
        similar: Annotated[str | None, Query(max_length=200, min_length=1, pattern=r"^[^\x00]*$")] = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Images, the newest job's first; `search` finds words of the prompt. `next` of the answer, given as `before`,
        goes on; it is null on the last page.

        `similar` gives the images that look most like some words instead, by the CLIP that ranks. Where `complete` is
        false not all of the library was compared yet: ask again.
        """
        if similar is None:
            cursor = None
            if before is not None:
                created, *numbers = before.split("_")
                cursor = Cursor(float(created), *map(int, numbers))
            rows = hub.ledger.images(owner, text=search, limit=limit, before=cursor)
            last = rows[-1] if len(rows) == limit else None
            following = None if last is None else "_".join(map(str, Cursor.of(last)))
            return {"images": [image_view(row) for row in rows], "next": following}
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
        return hub.file(mine(image, owner)["id"])

    @router.get("/{image}")
    def row(image: str, owner: Owner) -> dict[str, Any]:
        """An image's row, with all that draws it again."""
        found = mine(image, owner)
        return {**image_view(found), "parameters": found["parameters"]}

    @router.delete("/{image}", status_code=204)
    def delete(image: str, owner: Owner) -> None:
        """Delete an image for good."""
        hub.delete(mine(image, owner)["id"])

    return router


def openai_routes(hub: Hub) -> APIRouter:
    """OpenAI's images API."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post("/images/generations")
    async def generations(
        body: ImagesBody, request: Request, owner: Owner, person: Person, prefer: Annotated[str, Header()] = ""
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
        (job,) = await run_in_threadpool(lambda: hub.submit([wanted], owner, person=person))
        if "respond-async" in (part.strip().lower() for part in prefer.split(",")):
            headers = {"Location": f"/v1/jobs/{job.id}", "Preference-Applied": "respond-async"}
            return JSONResponse(await run_in_threadpool(hub.view, job), 202, headers)
        if body.stream:
            events = partial_events(hub, job, body.partial_images or 0)
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
        rows = await run_in_threadpool(hub.images, job)
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


async def partial_events(hub: Hub, job: Job, wanted: int) -> AsyncIterator[str]:
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
        for row in await run_in_threadpool(hub.images, job):
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


def requests_of(file: bytes, most: int) -> list[DrawBody]:
    """Requests of a text file, a prompt a line, or of a CSV file with a column ``prompt`` and further settings.

    Args:
        file: its bytes.
        most: jobs that may wait: a longer file is refused before its lines are looked at.

    Raises:
        HTTPException: a line is wrong; names it.
    """
    try:
        text = file.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise HTTPException(422, "the file is no UTF-8 text") from error
    first = text.partition("\n")[0].lower()
    between = next((mark for mark in ",;\t" if "prompt" in [n.strip(' "') for n in first.split(mark)]), None)
    if between is None:
        found = [(number, {"prompt": line.strip()}) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        found = table_of(text, between)
    if not found:
        raise HTTPException(422, "the file holds no prompt")
    if len(found) > most:
        raise HTTPException(422, f"{len(found)} jobs at once, {most} may wait at most")
    bodies = []
    for number, values in found:
        try:
            bodies.append(DrawBody.model_validate(values))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise HTTPException(422, f"line {number}: {name}: {first['msg']}") from error
    return bodies


def table_of(text: str, between: str) -> list[tuple[int, dict[str, str]]]:
    """Number and named cells of each line of a CSV file.

    Raises:
        HTTPException: a line is none of it; names it.
    """
    rows, found = csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True), []
    try:
        names = [name.strip().lower() for name in next(rows)]
        if len(set(names)) < len(names):
            raise HTTPException(422, "line 1: a column is named twice")
        for cells in rows:
            if len(cells) > len(names):
                raise HTTPException(422, f"line {rows.line_num}: {len(cells)} cells, there are {len(names)} columns")
            if values := {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}:
                found.append((rows.line_num, values))
    except csv.Error as error:
        raise HTTPException(422, f"line {rows.line_num}: no CSV: {error}") from error
    return found


def queue_routes(hub: Hub) -> APIRouter:
    """The queue as a whole."""
    router = APIRouter(prefix="/v1/queue", tags=["queue"])

    def shown(owner: str, person: str) -> dict[str, Any]:
        limits, usage, counts = hub.config.limits, hub.ledger.usage(person), hub.ledger.counts()
        bounds = {name: getattr(limits, name) for name in ("images", "prompt", "owned", "hourly")}
        return {
            "paused": hub.ledger.paused, "running": counts.get(RUNNING, 0), "queued": counts.get(QUEUED, 0),
            "seconds_an_image": hub.seconds_an_image(), "may_pause": hub.may_pause(owner),
            "limits": bounds, "used": usage._asdict(), "person": person, "keys": hub.config.keys is not None,
            "ranks": hub.config.clip is not None,
        }  # fmt: skip

    @router.get("")
    def queue(owner: Owner, person: Person) -> dict[str, Any]:
        """How full the queue is, how fast it goes, and what the asker may and has."""
        return shown(owner, person)

    @router.get("/jobs")
    def jobs(owner: Owner, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """The asker's jobs that run, then those that wait, in the order in which they are drawn."""
        names = ("id", "person", "state", "count", "progress", "priority")
        return {
            "jobs": [
                {"prompt": job.parameters["prompt"], **{name: getattr(job, name) for name in names}}
                for job in hub.ledger.queue(owner, limit=limit)
            ]
        }

    def set_paused(owner: str, person: str, paused: bool) -> dict[str, Any]:
        if not hub.may_pause(owner):
            raise HTTPException(403, "only those that admins= names may pause the queue")
        hub.ledger.pause(paused)
        return shown(owner, person)

    @router.post("/pause")
    def pause(owner: Owner, person: Person) -> dict[str, Any]:
        """Begin no new job; what is drawn already ends."""
        return set_paused(owner, person, True)

    @router.post("/resume")
    def resume(owner: Owner, person: Person) -> dict[str, Any]:
        """Go on."""
        return set_paused(owner, person, False)

    return router


def inspiration_routes(hub: Hub) -> APIRouter:
    """Parts of prompts."""
    router = APIRouter(tags=["queue"])

    @router.get("/v1/inspiration")
    def inspiration(owner: Owner) -> dict[str, Any]:
        """Parts of which the page of that name puts prompts together."""
        return {"parts": [part._asdict() for part in hub.parts]}

    return router


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
        speed.set(hub.seconds_an_image() or 0)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
