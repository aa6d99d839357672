"""The server: routes over the ledger, the library and the codec. No route draws; workers do.

Nothing here builds a path, an URL to fetch or HTML from what a client sends: images have ids that the server has made,
pages are static files.
"""

import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dalle_pytorch.distributed import find_device
from dalle_pytorch.serving.codec import routes as codec_routes
from dalle_pytorch.serving.config import ServeConfig
from dalle_pytorch.serving.engine import LocalEngine
from dalle_pytorch.serving.hub import Hub, owner_of
from dalle_pytorch.serving.keys import Keys
from dalle_pytorch.serving.ledger import Ledger
from dalle_pytorch.serving.library import Library
from dalle_pytorch.serving.playground import playground_routes
from dalle_pytorch.serving.routes import (
    health_routes,
    image_routes,
    inspiration_routes,
    job_routes,
    openai_routes,
    queue_routes,
)

log = logging.getLogger(__name__)
SECURE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


NO_KEY = "no key, or one that is not known"
PRIVATE = (
    "/v1/", "/encode", "/decode", "/compare", "/metrics",
    "/prompt", "/queue_status", "/getlibrary", "/deleteimage", "/library/",
)  # fmt: skip
"""What paths begin with that need a key, where there are any."""


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
    app.include_router(queue_routes(hub))
    app.include_router(inspiration_routes(hub))
    app.include_router(playground_routes(hub))
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
        origin = request.headers.get("origin")
        # the scheme may differ: a proxy in front speaks HTTPS
        foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")
        listed = origin in self.origins
        cors = {
            "access-control-allow-origin": str(origin), "vary": "origin",
            "access-control-expose-headers": "location, retry-after",
        } if foreign and listed else {}  # fmt: skip
        if foreign and not listed and request.method not in ("GET", "HEAD"):
            await error_answer(403, "requests from pages of other sites are not taken")(scope, receive, send)
            return
        if request.method == "OPTIONS":
            allowed = {"access-control-allow-methods": "GET, POST, DELETE", "access-control-allow-headers":
                       "authorization, content-type, idempotency-key, prefer, x-name"}  # fmt: skip
            await Response(status_code=204, headers={**cors, **(allowed if cors else {})})(scope, receive, send)
            return

        if request.url.path.startswith(PRIVATE):  # before the body is read
            request.state.owner = self.keys.owner(request.headers.get("authorization"))
            if request.state.owner is None:
                await error_answer(401, NO_KEY, {"WWW-Authenticate": "Bearer", **cors})(scope, receive, send)
                return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                extra = [(name.encode(), value.encode()) for name, value in {**SECURE, **cors}.items()]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in there)]
            await send(message)

        await self.app(scope, receive, answer)


def error_answer(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    content = {"error": {"message": message, "type": kind, "code": status}}
    return JSONResponse(content, status, {**SECURE, **(headers or {})})


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
