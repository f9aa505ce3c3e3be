"""A real server: its process, its socket, its signals."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

import slimwright
from slimwright.errors import InputError
from slimwright.serving import server
from slimwright.zoo import bundled_path


class Running:
    """``slimwright serve`` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "slimwright", "serve", str(bundled_path()), "--port", "0", *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Serving bundled at http://127.0.0.1:"), line + self.process.communicate()[1]
        self.url = line.split()[3]
        self.port = int(self.url.rpartition(":")[2])

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=600)[1]
        return self.process.returncode, said


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    made = Running("--slots", "2", "--dtype", "float32")
    yield made
    if made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


def body(**more: Any) -> dict[str, Any]:
    return {"model": "bundled", "prompt": "def ", "max_tokens": 4, "temperature": 0, **more}


def connected(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=300)


def head(length: int) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


def test_connections_that_are_dropped_idle_or_no_http(running: Running) -> None:
    """Whatever others do to their connections, the next request is served."""
    whole = json.dumps(body(max_tokens=900, stream=True)).encode()
    idle = [connected(running) for _ in range(50)]
    cut = (b"", b"POST /v1/comp", head(10_000), head(10_000) + b"{", b"\x00\xff\x16\x03\r\n\r\n")
    for sent in (*cut, head(len(whole)) + whole):
        with connected(running) as connection:
            connection.sendall(sent)
            if sent.endswith(whole):
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
    answer = httpx2.post(f"{running.url}/v1/completions", json=body(), timeout=600)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
    with connected(running) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"A: " + b"a" * 200_000)
        got = b""
        try:
            while part := connection.recv(4096):
                got += part
        except ConnectionError:
            pass
        assert got == b"" or got.startswith(b"HTTP/1.1 400")
    for connection in idle:
        connection.close()


def test_a_head_that_never_comes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is closed; one that has an answer coming is not."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    protocol = server.bounded_protocol()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(0.6)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async def go() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        made = uvicorn.Server(uvicorn.Config(app, http=protocol, lifespan="off", log_level="error", ws="none"))
        task = asyncio.create_task(made.serve(sockets=[listening]))
        while not made.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        assert await asyncio.wait_for(reader.read(), 30) == b""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), 30)).startswith(b"HTTP/1.1 204")
        made.should_exit = True
        await task

    asyncio.run(go())


def test_it_finishes_what_runs_and_then_stops(running: Running) -> None:
    """SIGTERM in the middle of a stream and of a whole answer: both end as they would have; exit code 0."""
    texts: dict[str, Any] = {}

    def stream() -> None:
        begun.release()
        with httpx2.stream(
            "POST", f"{running.url}/v1/completions", json=body(max_tokens=200, stream=True), timeout=600
        ) as answer:
            for line in answer.iter_lines():
                begun.release()
                texts["stream"] = line or texts.get("stream")

    def whole() -> None:
        begun.release()
        texts["whole"] = httpx2.post(f"{running.url}/v1/completions", json=body(max_tokens=200), timeout=600).json()

    begun = threading.Semaphore(0)
    threads = [threading.Thread(target=stream), threading.Thread(target=whole)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        begun.acquire()
    while "slimwright_running 2" not in httpx2.get(f"{running.url}/metrics", timeout=600).text:
        pass
    code, said = running.stop()
    for thread in threads:
        thread.join()
    assert code == 0 and "Traceback" not in said
    assert texts["stream"] == "data: [DONE]" and texts["whole"]["usage"]["completion_tokens"] == 200


def test_refusals_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(server.KEY_VARIABLE, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"Port \d+ .* cannot be had"):
        slimwright.serve(str(tmp_path), port=taken.getsockname()[1])
    for given, words in (
        ({"host": "0.0.0.0"}, "give --api-key"),
        ({"host": "no.such.name.invalid", "api_key": "k"}, "no address"),
        ({"port": 70000}, "--port"),
        ({"slots": 0}, "--slots"),
        ({"time_limit": 0}, "--time-limit"),
        ({"max_body": "much"}, "--max-body"),
        ({"adapters": ["name"]}, "NAME=DIRECTORY"),
        ({"port": 0}, str(tmp_path)),  # no model there
    ):
        with pytest.raises(InputError, match=words):
            slimwright.serve(str(tmp_path), **given)  # type: ignore[arg-type]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"needs uvicorn: `pip install 'slimwright\[serve\]'`"):
        slimwright.serve(str(tmp_path))
