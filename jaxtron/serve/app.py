"""The network side: routes, limits and streams. The one file that imports starlette and uvicorn."""

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from jaxtron.config import UserError
from jaxtron.serve.bodies import AskedText, is_id, read_chat, read_completion, read_json
from jaxtron.serve.errors import ApiError
from jaxtron.serve.request import ServeRequest
from jaxtron.serve.service import Reply, Service

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    uvicorn = None

logger = logging.getLogger(__name__)
# how long a client may take to send a body, and after the last token to read what it was sent
BODY_SECONDS, READ_SECONDS = 30.0, 30.0
# of what waits for answers when the server ends
GRACE_SECONDS = 10
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
MOST_TOKENIZED = 2**20


def check_installed() -> None:
    """A `UserError` unless what serves is there."""
    if uvicorn is None:
        raise UserError('serving needs the packages starlette and uvicorn: pip install "jaxtron[serve]"')


class WebServer:
    """A service at an address, answered from a thread of its own: `start`, and `stop` once nothing is to come."""

    def __init__(self, service: Service, request: ServeRequest):
        check_installed()
        assert uvicorn is not None
        self._socket = _bind(request.host, request.port)
        self.port: int = self._socket.getsockname()[1]
        app = make_app(service, request)
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", http="h11", ws="none", loop="asyncio",
            timeout_keep_alive=5, timeout_graceful_shutdown=GRACE_SECONDS, server_header=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._ended = service.worker.drain
        self._thread = threading.Thread(target=self._run, name="web", daemon=True)

    def start(self) -> None:
        """Begins to answer; returns when it does."""
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Takes no more connections, and ends once those that there are have read their answers, or soon after."""
        self._server.should_exit = True
        self._thread.join(GRACE_SECONDS + 5)

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            # whatever ended it, nothing comes any more
            self._ended()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        # without the address once more
        why = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
        raise UserError(f"cannot serve at --host {host} --port {port}: {why}; give another") from None


def check_address(request: ServeRequest) -> None:
    """A `UserError` unless the address can be had, as long before a model is read as afterwards."""
    _bind(request.host, request.port).close()


def make_app(service: Service, request: ServeRequest) -> Any:
    """The ASGI application."""
    check_installed()
    guard = _Guard(service, request)

    async def completions(found: Request) -> Response:
        return await _answered(service, found, read_completion(await guard.body(found)))

    async def chat(found: Request) -> Response:
        return await _answered(service, found, read_chat(await guard.body(found)))

    async def models(found: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(found: Request) -> Response:
        if found.path_params["name"] != service.name:
            raise ApiError(404, f"the model here is {service.name}", param="model", code="model_not_found")
        return JSONResponse(_model(service))

    async def health(found: Request) -> Response:
        if service.worker.is_draining:
            raise ApiError(503, "the server is stopping", code="stopping")
        return JSONResponse({"status": "ok"})

    async def tokenize(found: Request) -> Response:
        body = await guard.body(found)
        text, adds = body.get("prompt"), body.get("add_special_tokens", True)
        if not isinstance(text, str) or not isinstance(adds, bool):
            raise ApiError(400, "prompt must be a text, add_special_tokens true or false", param="prompt")
        tokens = await asyncio.to_thread(service.tokenize, text, adds)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": service.room})

    async def detokenize(found: Request) -> Response:
        tokens = (await guard.body(found)).get("tokens")
        if not isinstance(tokens, list) or len(tokens) > MOST_TOKENIZED or not all(map(is_id, tokens)):
            raise ApiError(400, "tokens must be a list of ids", param="tokens")
        return JSONResponse({"prompt": await asyncio.to_thread(service.detokenize, tokens)})

    async def tokenizer_info(found: Request) -> Response:
        return JSONResponse(service.tokenizer_info())

    posts = {
        "/v1/completions": completions,
        "/v1/chat/completions": chat,
        "/tokenize": tokenize,
        "/detokenize": detokenize,
    }
    gets = {"/v1/models": models, "/v1/models/{name:path}": model, "/tokenizer_info": tokenizer_info}
    routes = [Route(path, guard(run), methods=["POST"]) for path, run in posts.items()]
    routes += [Route(path, guard(run), methods=["GET"]) for path, run in gets.items()]
    routes.append(Route("/health", guard(health, is_open=True), methods=["GET"]))
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


class _Guard:
    """What every request has to pass, and every error as an answer."""

    def __init__(self, service: Service, request: ServeRequest):
        self._service = service
        self._limit = request.limits.body_bytes
        self._key = None if request.api_key is None else f"Bearer {request.api_key}".encode()
        # a page elsewhere may have its name mean this machine, to read what is served to it alone
        self._hosts = LOOPBACK if request.host in LOOPBACK else None

    def __call__(
        self, run: Callable[[Any], Awaitable[Any]], *, is_open: bool = False
    ) -> Callable[[Any], Awaitable[Any]]:
        async def guarded(found: Request) -> Response:
            try:
                self._check(found, is_open)
                return await run(found)
            except ApiError as error:
                return error_response(error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                logger.exception("%s failed", found.url.path)
                return error_response(ApiError(500, "the server failed at this request"))

        return guarded

    def _check(self, found: Any, is_open: bool) -> None:
        host = found.headers.get("host", "").rpartition(":")[0] or found.headers.get("host", "")
        name = found.headers.get("host", "") if found.headers.get("host", "").endswith("]") else host
        if self._hosts is not None and name not in self._hosts:
            raise ApiError(403, "this server answers its own machine: ask it as 127.0.0.1", code="host")
        if is_open or self._key is None:
            return
        given = found.headers.get("authorization", "").encode("utf-8", errors="replace")
        if not hmac.compare_digest(given, self._key):
            raise ApiError(401, "give the key as Authorization: Bearer KEY", code="invalid_api_key")

    async def body(self, found: Any) -> dict[str, Any]:
        """The object that was sent, of a size and in a time that are allowed, for the model that is here."""
        kind = found.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the body must be application/json")
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in found.stream():
                    content += part
                    if len(content) > self._limit:
                        raise ApiError(413, f"the body is longer than {self._limit:,} bytes")
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {BODY_SECONDS:g} s") from None
        body = read_json(bytes(content))
        name = body.get("model", self._service.name)
        if name != self._service.name:
            raise ApiError(404, f"the model here is {self._service.name}", param="model", code="model_not_found")
        return body


async def _answered(service: Service, found: Any, asked: AskedText) -> Any:
    if asked.stream:
        reply = await service.begin(asked)
        return _TimedStream(reply, service.limits.seconds + READ_SECONDS)
    answer = asyncio.ensure_future(service.answer(asked))
    gone = asyncio.ensure_future(_disconnected(found))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return Response(status_code=499)
        return JSONResponse(answer.result())
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _disconnected(found: Any) -> None:
    while (await found.receive())["type"] != "http.disconnect":
        pass


async def _events(reply: Reply) -> AsyncIterator[bytes]:
    """Server-sent events; an error after the first is one too."""
    async with contextlib.aclosing(reply.chunks()) as chunks:
        try:
            async for chunk in chunks:
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.json())
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode("utf-8", "replace")


def error_response(error: ApiError) -> Any:
    """An error as an answer."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
    return JSONResponse(error.json(), status_code=error.status, headers=headers.get(error.status))


async def _http_error(found: Any, error: Any) -> Any:
    what = {404: "there is nothing at this path", 405: "this path takes another method"}
    return error_response(ApiError(error.status_code, what.get(error.status_code, str(error.detail))))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "jaxtron",
        "max_model_len": service.room,
    }


if uvicorn is not None:

    class _TimedStream(StreamingResponse):
        """A stream that a reader may not keep open for ever, and that ends with its reader."""

        def __init__(self, reply: Reply, seconds: float):
            super().__init__(_events(reply), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            self._reply, self._seconds = reply, seconds

        async def __call__(self, scope, receive, send) -> None:
            try:
                async with asyncio.timeout(self._seconds):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                # the connection is closed, for the answer was not whole
                return
            finally:
                self._reply.close()
