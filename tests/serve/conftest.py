"""A server over the fake engine, on a real socket of this machine."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from jaxtron.generate.opening import SpeakingModel
from jaxtron.generate.source import ModelSource
from jaxtron.serve.app import WebServer
from jaxtron.serve.request import Limits, ServeRequest
from jaxtron.serve.service import Service
from tests.support.fake_engine import FakeEngine, fake_model


@dataclass
class Running:
    """A server that runs, and how it is asked."""

    engine: FakeEngine
    service: Service
    port: int
    headers: dict[str, str]

    def connect(self, timeout: float = 20.0) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON; a GET without a body."""
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} if body is not None else {}
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET" if body is None else "POST", path, content, given | self.headers | headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """What a stream says, without its last line."""
        with contextlib.closing(self.connect()) as connection:
            given = {"Content-Type": "application/json"} | self.headers
            connection.request("POST", path, json.dumps(body | {"stream": True}), given)
            response = connection.getresponse()
            text = response.read().decode()
        assert response.status == 200, text
        assert (response.getheader("content-type") or "").startswith("text/event-stream")
        lines = [line for line in text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def wait(self, is_so: Callable[[], bool], seconds: float = 10.0) -> None:
        """Until something is so."""
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end, "it never came to be so"
            time.sleep(0.01)

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def running(
    engine: FakeEngine,
    *,
    chat: bool = True,
    key: str | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """A server until the block ends; then it has to end by itself, with nothing left."""
    with serving(fake_model(engine, chat=chat), key=key, **limits) as (service, port):
        yield Running(engine, service, port, {} if key is None else {"Authorization": f"Bearer {key}"})
    assert not engine.there


@contextlib.contextmanager
def serving(model: SpeakingModel, *, key: str | None = None, **limits: Any) -> Iterator[tuple[Service, int]]:
    """A service of a model and its port, until the block ends; then it has to end by itself."""
    request = ServeRequest(
        ModelSource(Path("nowhere")), port=0, name="letters", api_key=key, limits=replace(Limits(), **limits)
    )
    service = Service(model, request.name, request.limits)
    server = WebServer(service, request)
    worker = threading.Thread(target=service.worker.run, daemon=True)
    worker.start()
    server.start()
    try:
        yield service, server.port
    finally:
        service.worker.drain()
        worker.join(10)
        server.stop()
    assert not worker.is_alive()


@pytest.fixture(scope="module")
def letters() -> Iterator[Running]:
    """A server of four rows."""
    with running(FakeEngine()) as found:
        yield found
