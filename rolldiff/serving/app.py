"""`create_app` and `run`: the HTTP side of `rolldiff serve`.

    POST /v1/images/generations   images of a prompt, whole or as a stream of frames
    POST /v1/images/edits         a part of an image drawn anew
    GET  /v1/models, /v1/models/NAME, /v1/schedule, /healthz, /metrics
    GET  /                        the page

Whatever a client sends, it gets an answer in OpenAI's words; a traceback goes to the log alone.
"""

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rolldiff.errors import UsageError, whole_number
from rolldiff.serving import wire
from rolldiff.serving.model import Limits, Served
from rolldiff.serving.wire import Picture, RequestError
from rolldiff.serving.worker import Job, Worker

__all__ = ["create_app", "run"]

PAGE = Path(__file__).parent / "page"
KEEP_ALIVE = 15.0  # seconds
MAX_CELLS = 2**18  # of a scheduling matrix
LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
# The page is allowed its own files and its own server, and nothing else.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
log = logging.getLogger("rolldiff.serving")


def create_app(
    served: Served,
    limits: Limits = Limits(),
    *,
    api_key: str | None = None,
    hosts: tuple[str, ...] | None = None,
) -> ASGIApp:
    """The server as an ASGI application, for any server of these.

    Args:
        served: the model.
        limits: what is accepted.
        api_key: what `Authorization: Bearer` must hold; None lets everybody in.
        hosts: names by which the server may be called; None for any. A page of another site, whose
            name leads to this computer, is refused so.
    """
    worker, metrics = Worker(served, limits), _Metrics()
    serving = _Serving(served, limits, worker)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    def counters(request: Request) -> Response:
        metrics.waiting.set(worker.load[0])
        metrics.running.set(worker.load[1])
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    created = int(time.time())
    api = [
        Route("/images/generations", serving.generations, methods=["POST"]),
        Route("/images/edits", serving.edits, methods=["POST"]),
        Route("/models", lambda request: JSONResponse(_models(served, limits, created))),
        Route("/models/{name:path}", lambda request: _model(request, served, limits, created)),
        Route("/schedule", serving.schedule),
    ]
    routes = [
        Mount("/v1", routes=api),
        Route("/healthz", lambda request: JSONResponse({"status": "ok"})),
        Route("/metrics", counters),
        Mount("/", StaticFiles(directory=PAGE, html=True)),
    ]
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            Middleware(_Guard, limits=limits, api_key=api_key, hosts=hosts, metrics=metrics)
        ],
        exception_handlers={
            RequestError: _refuse,
            HTTPException: _refuse_http,
            Exception: _refuse_bug,
        },
    )


def run(
    served: Served,
    limits: Limits = Limits(),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; what runs then has ten seconds to end.

    Args:
        served: the model.
        limits: what is accepted.
        host: the address to listen on. Any but this computer's own needs a key.
        port: 0 for any that is free.
        api_key: see `create_app`.

    Raises:
        UsageError: if an argument is out of range, or there is no such address here.
        OSError: if the port is taken.
    """
    port = whole_number(port, "port", minimum=0, maximum=65535)
    if api_key is not None and (not isinstance(api_key, str) or not api_key.strip()):
        raise UsageError("api_key must be a text that is not empty, got an empty one")
    if not _is_local(host) and api_key is None:
        raise UsageError(f"api_key must be set to listen on {host}, got none; add api_key=SECRET")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
    except OSError as error:
        raise UsageError(f"host must be an address of this computer, got {host}") from error
    # asyncio sends answers without delay only from sockets that name their protocol, as those of
    # `socket.create_server` do not: 40 ms per request.
    with socket.socket(family, kind, protocol) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)  # before the address is told
        name = f"[{host}]" if ":" in host else host
        print(f"rolldiff: http://{name}:{listening.getsockname()[1]}/ (Ctrl-C stops)", flush=True)
        hosts = (*LOCAL_NAMES, host) if api_key is None else None
        config = uvicorn.Config(
            create_app(served, limits, api_key=api_key, hosts=hosts),
            log_level="warning",
            limit_concurrency=limits.connections,
            timeout_graceful_shutdown=10,
            server_header=False,
            ws="none",
        )
        uvicorn.Server(config).run(sockets=[listening])


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Serving:
    """The answers to requests for images."""

    def __init__(self, served: Served, limits: Limits, worker: Worker) -> None:
        self.served, self.limits, self.worker = served, limits, worker

    async def generations(self, request: Request) -> Response:
        _check_type(request, "application/json")
        fields = wire.parse_json(await self._in_time(request.body()))
        asked = await asyncio.to_thread(wire.parse, fields, self.served, self.limits)
        return await self._answer(request, asked, kind="image_generation")

    async def edits(self, request: Request) -> Response:
        _check_type(request, "multipart/form-data")
        form = request.form(max_files=4, max_fields=64, max_part_size=2**16)
        texts: dict[str, str] = {}
        files: dict[str, bytes] = {}
        async with contextlib.AsyncExitStack() as stack:
            found = await self._in_time(form)
            stack.push_async_callback(found.close)
            for name, value in found.multi_items():
                name = name.removesuffix("[]")
                if name in texts or name in files:
                    raise RequestError(f"{name} must be given once, got it twice", param=name)
                if isinstance(value, UploadFile):
                    files[name] = await value.read()
                else:
                    texts[name] = value
        if "image" not in files or not files.keys() <= {"image", "mask"}:
            names = ", ".join(files) or "none"
            raise RequestError(f"the files must be image and mask, got {names}", param="image")
        asked = await asyncio.to_thread(self._edit, texts, files)
        return await self._answer(request, asked, kind="image_edit")

    def _edit(self, texts: dict[str, str], files: dict[str, bytes]) -> wire.ImageRequest:
        if self.served.prior is not None:
            raise RequestError("edits need a decoder without a prior, got one of a tokenizer")
        image, mask = wire.edited(
            files["image"], files.get("mask"), self.served, limits=self.limits
        )
        fields = wire.parse_form(texts)
        return wire.parse(fields, self.served, self.limits, image=image, mask=mask)

    async def _in_time(self, reading: Awaitable[Any]) -> Any:
        """What a client sends, if it arrives in time."""
        try:
            return await asyncio.wait_for(reading, self.limits.seconds)
        except TimeoutError as error:
            raise RequestError("the body must arrive sooner", status=408) from error

    async def _answer(
        self, request: Request, asked: wire.ImageRequest, *, kind: wire.Kind
    ) -> Response:
        loop = asyncio.get_running_loop()
        frames: asyncio.Queue[Picture | RequestError] = asyncio.Queue()

        def emit(frame: Picture | RequestError) -> None:
            loop.call_soon_threadsafe(frames.put_nowait, frame)

        job = Job(asked, emit)
        self.worker.submit(job)
        if asked.stream:
            return StreamingResponse(
                self._events(request, job, frames, kind=kind),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        film = asked.output_format == "gif"
        shown = []
        async with contextlib.aclosing(self._frames(request, job, frames)) as arriving:
            async for frame in arriving:
                if isinstance(frame, RequestError):
                    raise frame
                if frame is not None and (film or frame.last):
                    shown.append(frame)
        if not shown:
            return Response(status_code=499)  # the client has gone; nobody reads this
        return JSONResponse(await asyncio.to_thread(wire.answer, asked, shown))

    async def _events(
        self, request: Request, job: Job, frames: asyncio.Queue, *, kind: wire.Kind
    ) -> AsyncIterator[bytes]:
        index = 0
        async with contextlib.aclosing(self._frames(request, job, frames)) as arriving:
            async for frame in arriving:
                if frame is None:
                    yield b": keep-alive\n\n"
                elif isinstance(frame, RequestError):
                    yield wire.error_event(frame)
                else:
                    yield await asyncio.to_thread(
                        wire.event, job.request, frame, kind=kind, index=index
                    )
                    index += 1

    async def _frames(
        self, request: Request, job: Job, frames: asyncio.Queue
    ) -> AsyncGenerator[Picture | RequestError | None, None]:
        """Frames as they come, None when there was none for a while; ends with its client."""
        gone = asyncio.create_task(_until_gone(request))
        coming: asyncio.Task | None = None
        try:
            while True:
                coming = coming or asyncio.create_task(frames.get())
                await asyncio.wait(
                    (gone, coming), timeout=KEEP_ALIVE, return_when=asyncio.FIRST_COMPLETED
                )
                if gone.done():
                    return
                if not coming.done():
                    yield None
                    continue
                frame, coming = coming.result(), None
                yield frame
                if isinstance(frame, RequestError) or frame.last:
                    return
        finally:
            self.worker.cancel(job)
            gone.cancel()
            if coming is not None:
                coming.cancel()

    def schedule(self, request: Request) -> Response:
        """The scheduling matrix of some settings, for who draws it."""
        fields = wire.parse_form(dict(request.query_params))
        asked = wire.parse_schedule(fields, self.served, self.limits)
        if (asked.num_steps + 1) * asked.num_groups > MAX_CELLS:
            raise RequestError(f"the matrix must have at most {MAX_CELLS} cells")
        matrix = [[round(t, 4) for t in row] for row in asked.matrix.tolist()]
        return JSONResponse({"matrix": matrix, "overlap": asked.realised_overlap})


def _check_type(request: Request, expected: str) -> None:
    """Refuse another type: a page of another site can send forms and texts unasked, but no JSON."""
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != expected:
        raise RequestError(f"the Content-Type must be {expected}", status=415)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _models(served: Served, limits: Limits, created: int) -> dict[str, Any]:
    return {"object": "list", "data": [_about(served, limits, created)]}


def _model(request: Request, served: Served, limits: Limits, created: int) -> Response:
    if request.path_params["name"] != served.name:
        raise RequestError(f"model must be {served.name}", status=404, code="model_not_found")
    return JSONResponse(_about(served, limits, created))


def _about(served: Served, limits: Limits, created: int) -> dict[str, Any]:
    """A model in OpenAI's words, and what the page needs to know of it."""
    training, config = served.decoder.training_distribution, served.config
    height, width = served.image_size
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "rolldiff",
        "rolldiff": {
            "size": f"{width}x{height}",
            "any_size": served.any_size,
            "tokens": served.decoder.layout.num_tokens,
            "classes": list(served.classes),
            "prompts": list(served.prompts),
            "no_class": served.takes_no_class,
            "num_groups": sorted(set(training.num_groups)),
            "orders": [order for order in training.orders if isinstance(order, str)],
            "edits": served.prior is None,
            "defaults": {name: getattr(config, name) for name in wire.SETTINGS},
            "limits": {
                "partial_images": limits.partial_images,
                "steps": limits.steps,
                "images": limits.images,
            },
        },
    }


# ---------------------------------------------------------------------------------------------
# Before and after an answer


class _Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "rolldiff_requests", "answered requests", ("path", "status"), registry=registry
        )
        self.seconds = Histogram(
            "rolldiff_request_seconds", "seconds of a request", ("path",), registry=registry
        )
        self.waiting = Gauge("rolldiff_waiting", "requests that wait", registry=registry)
        self.running = Gauge("rolldiff_running", "requests that are decoded", registry=registry)


class _Guard:
    """Refuses what may not come in before anything else reads it, and counts all answers."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        api_key: str | None,
        hosts: tuple[str, ...] | None,
        metrics: _Metrics,
    ) -> None:
        self.app, self.limits, self.metrics = app, limits, metrics
        self.api_key, self.hosts = api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500
        headers = {name.lower(): value for name, value in scope["headers"]}

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limits.body:
                raise self._too_large()
            return message

        try:
            self._check(scope["path"], headers)
        except RequestError as refused:
            response = JSONResponse(wire.error_body(refused), status_code=refused.status)
            await response(scope, receive, watched)
        else:
            await self.app(scope, bounded, watched)
        finally:
            path = scope["path"]
            route = "/v1/models" if path.startswith("/v1/models") else path
            if route in ("/v1/images/generations", "/v1/images/edits", "/v1/models"):
                self.metrics.requests.labels(route, str(status)).inc()
                self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.hosts is not None and _host(headers.get(b"host", b"")) not in self.hosts:
            raise RequestError(f"the host must be {' or '.join(self.hosts)}", status=421)
        if self.api_key is not None and path.startswith(("/v1", "/metrics")):
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not secrets.compare_digest(given, self.api_key.encode()):
                raise RequestError(
                    "the API key is missing or wrong", status=401, code="invalid_api_key"
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.limits.body:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(f"the body must be at most {self.limits.body} bytes", status=413)


def _host(header: bytes) -> str:
    """The name in a Host header, without its port."""
    text = header.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return JSONResponse(wire.error_body(error), status_code=error.status, headers=headers)


async def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = RequestError(str(error.detail), status=error.status_code)
    return JSONResponse(
        wire.error_body(refused), status_code=error.status_code, headers=error.headers
    )


async def _refuse_bug(request: Request, error: Exception) -> Response:
    refused = RequestError("the server failed; its log says why", status=500)
    return JSONResponse(wire.error_body(refused), status_code=500)
