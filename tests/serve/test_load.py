"""Many requests at once, readers that leave or dawdle, limits, keys, and a server that is told to stop."""

import concurrent.futures
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxtron.config import UserError
from jaxtron.serve.request import parse
from tests.serve.conftest import Running, running
from tests.support.fake_engine import FakeEngine

ROOT = Path(__file__).parent.parent.parent
STREAM = {"prompt": "a", "max_tokens": 60, "stream": True}


def send(connection: socket.socket, body: dict) -> None:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)


def test_fifty_at_once_share_the_rows_and_each_has_its_own_answer():
    with running(FakeEngine(rows=4, seconds=0.002)) as found:

        def ask(number: int) -> str:
            letter = chr(ord("a") + number % 10)
            body = {"prompt": letter, "max_tokens": 3 + number % 7, "n": 1 + number % 2}
            if number % 3 == 0:
                events = found.events("/v1/completions", body | {"n": 1})
                text = "".join(event["choices"][0]["text"] for event in events)
            else:
                status, answer = found.ask("/v1/completions", body)
                assert status == 200
                texts = {choice["text"] for choice in answer["choices"]}
                assert len(texts) == 1 and len(answer["choices"]) == body["n"]
                (text,) = texts
            assert text == "".join(chr(ord(letter) + 1 + step) for step in range(body["max_tokens"]))
            return text

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            assert len(list(pool.map(ask, range(50)))) == 50
        assert found.engine.most_at_once == 4
        # together, and not one after the other
        assert found.engine.num_steps < sum((3 + number % 7) * (1 + number % 2) for number in range(50)) / 2


def test_a_row_is_free_again_when_its_reader_leaves():
    with running(FakeEngine(rows=1, room=5000, seconds=0.005)) as found:
        for body in (
            STREAM | {"max_tokens": 4000, "ignore_eos": True},
            {"prompt": "a", "max_tokens": 4000, "ignore_eos": True},
        ):
            with found.raw() as connection:
                send(connection, body)
                if body.get("stream"):
                    assert connection.recv(100)
                found.wait(lambda: bool(found.engine.there))
            found.wait(lambda: not found.engine.there)
        # one that waits in the queue and leaves, too
        with found.raw() as first:
            send(first, STREAM | {"max_tokens": 4000, "ignore_eos": True})
            found.wait(lambda: bool(found.engine.there))
            with found.raw() as second:
                send(second, STREAM)
                time.sleep(0.1)
        found.wait(lambda: not found.engine.there)
        before = found.engine.num_steps
        assert found.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
        assert found.engine.num_steps - before < 10


def test_a_slow_reader_holds_nobody_up():
    with running(FakeEngine(rows=2, room=3000)) as found:
        with found.raw() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            send(slow, STREAM | {"max_tokens": 2900, "ignore_eos": True, "logprobs": 20})
            # its row is done long before it has read
            found.wait(lambda: len(found.engine.begun) == 1 and not found.engine.there)
            for _ in range(5):
                assert found.ask("/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
            content = b""
            while b"[DONE]" not in content[-100:]:
                content += slow.recv(2**16)
            assert content.count(b"data: ") >= 2900


def test_limits():
    limits = {"body_bytes": 1000, "prompt_tokens": 10, "new_tokens": 20, "waiting": 1}
    with running(FakeEngine(rows=1, room=5000, seconds=0.01), **limits) as found:
        status, answer = found.ask("/v1/completions", {"prompt": "a" * 1000})
        assert status == 413 and "1,000 bytes" in answer["error"]["message"]
        status, answer = found.ask("/v1/completions", {"prompt": "a" * 11})
        assert status == 400 and answer["error"]["code"] == "context_length_exceeded"
        status, answer = found.ask("/v1/completions", {"prompt": "a", "max_tokens": 21})
        assert status == 400 and "20" in answer["error"]["message"]
        # of a chat that says no number it is the limit
        chat = {"messages": [{"role": "u", "content": ""}]}
        assert found.ask("/v1/chat/completions", chat)[0] == 400
        with found.raw() as first, found.raw() as second:
            send(first, STREAM | {"max_tokens": 20})
            found.wait(lambda: bool(found.engine.there))
            send(second, STREAM | {"max_tokens": 20})
            time.sleep(0.05)
            status, answer = found.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})
            assert status == 429 and answer["error"]["code"] == "busy"


def test_time_runs_out():
    with running(FakeEngine(rows=1, room=5000, seconds=0.01), seconds=0.3) as found:
        status, answer = found.ask("/v1/completions", {"prompt": "a", "max_tokens": 4000, "ignore_eos": True})
        assert status == 504 and answer["error"]["code"] == "timeout"
        events = found.events("/v1/completions", STREAM | {"max_tokens": 4000, "ignore_eos": True})
        assert len(events) > 3 and events[-1]["error"]["code"] == "timeout"
        found.wait(lambda: not found.engine.there)


def test_a_key():
    with running(FakeEngine(), key="s3cret") as found:
        body = {"prompt": "a", "max_tokens": 1}
        assert found.ask("/v1/completions", body)[0] == 200
        for given in ("", "Bearer", "Bearer s3cre", "Bearer s3cret ", "bearer s3cret", "s3cret", "Bearer \xe9"):
            status, answer = found.ask("/v1/completions", body, Authorization=given)
            assert (status == 401) == (given.strip() != "Bearer s3cret"), given
        assert found.ask("/v1/models", Authorization="x")[0] == 401
        # a balancer asks without
        assert found.ask("/health", Authorization="x")[0] == 200


def test_only_this_machine_and_only_json(letters: Running):
    body = {"prompt": "a", "max_tokens": 1}
    assert letters.ask("/v1/completions", body, Host="evil.example:80")[0] == 403
    for host in ("localhost", "127.0.0.1", f"127.0.0.1:{letters.port}", "[::1]", "[::1]:80"):
        assert letters.ask("/health", Host=host)[0] == 200
    # what a page elsewhere may send without being asked
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert letters.ask("/v1/completions", body, **{"Content-Type": kind})[0] == 415
    assert letters.ask("/v1/completions", body, **{"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


@pytest.mark.parametrize(
    "words", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: " + b"x" * 100_000, b"POST /v1/completions HTTP/1.1\r\n"]
)
def test_what_is_no_request_harms_nobody(letters: Running, words: bytes):
    with letters.raw() as connection:
        connection.sendall(words)
        connection.settimeout(0.3)
        try:
            connection.recv(1000)
        except TimeoutError:
            pass
    assert letters.ask("/health")[0] == 200


def test_a_body_that_is_longer_than_it_said_or_comes_in_pieces(letters: Running):
    content = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    with letters.raw() as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        head += "Transfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        for byte in content:
            connection.sendall(b"1\r\n" + bytes([byte]) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)


def test_what_is_there_ends_and_what_is_new_is_sent_away():
    with running(FakeEngine(rows=1, room=5000, seconds=0.01)) as found:
        with found.raw() as connection:
            send(connection, STREAM | {"max_tokens": 50, "ignore_eos": True})
            found.wait(lambda: bool(found.engine.there))
            found.service.worker.drain()
            status, answer = found.ask("/v1/completions", {"prompt": "a"})
            assert status == 503 and answer["error"]["code"] == "stopping" and found.ask("/health")[0] == 503
            content = b""
            while b"[DONE]" not in content:
                content += connection.recv(2**16)
        assert b'"finish_reason":"length"' in content


PROGRAM = """
import sys
from pathlib import Path
from jaxtron import interrupts
from jaxtron.command import run_command
interrupts.watch()
from contextlib import contextmanager
from jaxtron.generate.source import ModelSource
from jaxtron.serve import run
from jaxtron.serve.request import ServeRequest
from tests.support.fake_engine import FakeEngine, fake_model
model = fake_model(FakeEngine(rows=1, room=5000, seconds=0.02))
run.open_model = contextmanager(lambda *_, **__: iter([model]))
run.start_runtime = lambda *_, **__: None
request = ServeRequest(ModelSource(Path("x")), port=0, name="letters")
sys.exit(run_command(lambda _: run.serve(request, model.configuration)))
"""


@pytest.mark.parametrize(("number", "again"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)])
def test_a_signal_lets_requests_end_and_a_second_does_not(number: signal.Signals, again: bool):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "serving letters at http://127.0.0.1:" in line, line + process.communicate()[1]
    port = int(line.partition("127.0.0.1:")[2].partition("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(
        "POST", "/v1/completions", json.dumps(STREAM | {"ignore_eos": True}), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.read(10)
    process.send_signal(number)
    if again:
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(10) in (143, -signal.SIGTERM)
    else:
        assert response.read().endswith(b"data: [DONE]\n\n")
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0 and out.endswith("stopped\n")
        assert ("stopping once" in err) == (number == signal.SIGINT) and "Traceback" not in err
    connection.close()
    process.communicate()


def test_a_port_that_is_taken_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot serve at --host 127.0.0.1 --port {port}: .*; give another"):
            start_at(port)


def start_at(port: int) -> None:
    from jaxtron.serve.app import _bind

    _bind("127.0.0.1", port).close()


def test_lines(tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("abc\n")
    request = parse([str(tmp_path), "--port", "0", "--api_key_file", str(key), "--time_limit", "5", "--rows", "3"])
    assert (request.port, request.api_key, request.limits.seconds, request.source.rows) == (0, "abc", 5.0, 3)
    assert request.name == tmp_path.name and request.host == "127.0.0.1" and threading.active_count()
    for words, message in (
        (["--port", "70000"], "at most 65535"),
        (["--api_key_file", "nowhere"], "cannot read"),
        (["--model.hidden_size", "3"], "the model's own"),
        (["--temperature", "1"], "unknown flag"),
    ):
        with pytest.raises(UserError, match=message):
            parse([str(tmp_path), *words])
    key.write_text("a b")
    with pytest.raises(UserError, match="one word"):
        parse([str(tmp_path), "--api_key_file", str(key)])
