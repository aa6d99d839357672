"""The routes of Nick's playground, with its names, over the same ledger and library.

Where that server dropped the connection or answered 500, this one says what is wrong. Its ids are UUIDs: those of the
ledger written with dashes.
"""

import json
import re
import secrets
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Response
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from dalle_pytorch.files import is_unicode
from dalle_pytorch.serving.hub import DrawBody, Hub, Owner, Person
from dalle_pytorch.serving.ledger import Job

PATH = re.compile(r"/?library/(?P<job>[0-9a-f-]{36})/(?P<image>[0-9a-f-]{36})\.png")
LARGEST_SEED = 1 << 32
LEAST_TEMPERATURE = 0.01
"""What the playground made of a temperature of 0."""
MAX_EXTRAS = 2000
"""Characters of further fields of a prompt, which are kept and given back."""


class PromptBody(BaseModel):
    """What to draw; numbers may be texts. Further fields are kept and given back by /queue_status."""

    model_config = ConfigDict(extra="allow")

    text: Annotated[str, StringConstraints(min_length=1)] = Field(examples=["a red apple"])
    num_images: int = Field(ge=1, examples=["4"])
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="0 = any")
    gen_top_k: int | None = Field(None, ge=0, lt=1 << 31)
    gen_top_p: float | None = Field(None, gt=0, le=1)
    temperature: float | None = Field(None, ge=0, le=100)
    condition_scale: float | None = Field(None, ge=-100, le=100)


class DeleteBody(BaseModel):
    """Which image."""

    path: str = Field(max_length=200, examples=["library/<queue_id>/<uuid>.png"])


def dashed(name: str) -> str:
    """An id of the ledger as a UUID."""
    return f"{name[:8]}-{name[8:12]}-{name[12:16]}-{name[16:20]}-{name[20:]}"


def playground_routes(hub: Hub) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["playground"])

    @router.post("/prompt")
    def prompt(body: PromptBody, owner: Owner, person: Person) -> dict[str, str]:
        """Queue a prompt."""
        asked = body.model_dump(exclude_none=True)
        try:
            extras = json.dumps(body.model_extra or {}, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise HTTPException(422, "a further field holds a number that is none") from error
        if len(extras) > MAX_EXTRAS or not is_unicode(extras) or "\\u0000" in extras:
            raise HTTPException(422, f"further fields are text and numbers, {MAX_EXTRAS} characters at most")
        temperature = None if body.temperature is None else max(body.temperature, LEAST_TEMPERATURE)
        wanted = DrawBody(
            prompt=body.text, n=body.num_images, seed=body.seed or 1 + secrets.randbelow(LARGEST_SEED - 1),
            top_k=body.gen_top_k, top_p=body.gen_top_p, temperature=temperature, cfg_scale=body.condition_scale,
        )  # fmt: skip
        (job,) = hub.submit([wanted], owner, person=person, asked=asked)
        return {"queue_id": dashed(job.id)}

    @router.get("/queue_status")
    def queue_status(owner: Owner) -> list[dict[str, Any]]:
        """What is drawn, then what waits, in order."""
        return [status_of(job) for job in hub.ledger.queue(owner)]

    @router.get("/getlibrary")
    def getlibrary(owner: Owner) -> Response:
        """All images by prompt, the newest first."""
        groups: dict[str, dict[str, Any]] = {}
        for image, job, prompt, seed, started, finished, created in hub.ledger.groups(owner):
            if job not in groups:
                groups[job] = {
                    "creation_unixtime": finished or created, "generated_images": [],
                    "process_time_secs": round((finished or 0.0) - (started or 0.0), 2), "queue_id": dashed(job),
                    "seed": seed, "text_prompt": prompt,
                }  # fmt: skip
            groups[job]["generated_images"].append(f"library/{dashed(job)}/{dashed(image)}.png")
        return JSONResponse(list(groups.values()))

    @router.post("/deleteimage")
    def deleteimage(body: DeleteBody, owner: Owner) -> Response:
        """Delete an image for good."""
        found = PATH.fullmatch(body.path)
        try:
            row = find(owner, *found.group("job", "image")) if found else None
        except HTTPException:
            row = None
        if row is None:
            return JSONResponse({"success": False, "error": "no such image"}, 404)
        hub.delete(row["id"])
        return JSONResponse({"success": True})

    @router.get("/library/{queue_id}/{image}.png", response_class=FileResponse)
    def file(queue_id: str, image: str, owner: Owner) -> FileResponse:
        """An image."""
        return hub.file(find(owner, queue_id, image)["id"])

    def find(owner: str, queue_id: str, image: str) -> Any:
        try:
            row = hub.ledger.image(uuid.UUID(image).hex, owner)
            if row["job"] == uuid.UUID(queue_id).hex:
                return row
        except (KeyError, ValueError):
            pass
        raise HTTPException(404, "no such image")

    for page in ("advanced", "library", "inspiration"):
        router.add_route(f"/{page}.html", lambda _, page=page: RedirectResponse(f"/#{page}"))
    return router


def status_of(job: Job) -> dict[str, Any]:
    """A job as the playground's queue shows it."""
    asked = job.parameters.get("asked") or {
        "text": job.parameters["prompt"], "num_images": job.count, "seed": job.parameters["seed"]
    }  # fmt: skip
    return {**asked, "queue_id": dashed(job.id)}
