"""The server under load: ``python -m benchmarks.serving [--model DIR] [--clients 32] [--requests 20] [--many 10000]``.

Without ``--model`` the bundled language model on ``int4:g32`` is served in float32. Clients ask it in turn for texts of
mixed lengths, half of them streamed: every answer must come, and be what ``generate`` makes of that request alone. Then
connections are dropped, left idle and filled with what is no request; then memory after many requests is compared with
that after a hundred; then schemathesis and the official ``openai`` client ask, where they are installed. Where
``--llama-server`` names llama.cpp's server and ``--gguf`` the same model for it, the same load goes to both in turns,
with as many slots and threads; llama.cpp rounds activations to 8 bits, this server has them in ``--dtype``.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch
from transformers import AutoTokenizer

import slimwright
from benchmarks.common import Row, exit_code, publish, scratch
from slimwright.zoo import bundled_path
from slimwright.zoo.text import standard_library

SLOTS = 16
Asked = tuple[tuple[int, ...], int]
"""Tokens of a prompt, and how many more are wanted."""


class Server:
    """A server in a process of its own."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        with open(log, "w") as output:
            self.process = subprocess.Popen([*command, "--port", str(self.port)], stdout=output, stderr=output)
        self.watched = psutil.Process(self.process.pid)
        for _ in range(1200):
            try:
                if httpx2.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise SystemExit(f"{command[0]} did not start: {log.read_text()[-500:]}")

    def cpu(self) -> float:
        times = self.watched.cpu_times()
        return times.user + times.system

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(120)


@contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[Server]:
    server = Server(command, log)
    try:
        yield server
    finally:
        server.stop()


def load_of(tokenizer: Any, count: int, longest: int, most: int) -> list[Asked]:
    """Prompts of mixed lengths from held-out text."""
    numbers = random.Random(0)
    texts = [document.text for document in standard_library("heldout")]
    found: list[Asked] = []
    while len(found) < count:
        ids = tokenizer(numbers.choice(texts)[:8000], verbose=False).input_ids
        length, start = numbers.randint(2, longest), numbers.randrange(max(1, len(ids) - longest))
        if len(ids) - start >= length:
            found.append((tuple(ids[start : start + length]), numbers.randint(1, most)))
    return found


async def one(client: httpx2.AsyncClient, model: str, asked: Asked, stream: bool) -> tuple[str, list[float]]:
    """The answer, and the times at which its pieces came (seconds from the question)."""
    prompt, most = asked
    body = {"model": model, "prompt": list(prompt), "max_tokens": most, "temperature": 0, "stream": stream}
    started = time.perf_counter()
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        return answer.json()["choices"][0]["text"], [time.perf_counter() - started]
    text, times = "", []
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for event in lines(answer):
            piece = event["choices"][0]["text"] if event.get("choices") else ""
            if piece:
                times.append(time.perf_counter() - started)
                text += piece
    return text, times


async def lines(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


async def clients(url: str, model: str, load: Sequence[Asked], count: int, stream: bool | None) -> list[Any]:
    """What every request of the load gives, ``count`` clients sharing them; an error in place of what is lost."""
    found: list[Any] = [None] * len(load)

    async def client(first: int) -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=900) as made:
            for index in range(first, len(load), count):
                try:
                    how = index % 2 == 0 if stream is None else stream
                    found[index] = await one(made, model, load[index], how)
                except Exception as error:
                    found[index] = error

    await asyncio.gather(*(client(first) for first in range(count)))
    return found


def alone(directory: str, tokenizer: Any, load: Sequence[Asked]) -> list[str]:
    """What ``generate`` makes of each request by itself."""
    model = slimwright.load(directory, dtype=torch.float32)
    known: dict[Asked, str] = {}
    for asked in load:
        if asked not in known:
            prompt, most = asked
            out = model.generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False, pad_token_id=0)[0]
            known[asked] = decoded(tokenizer, prompt, out.tolist()[len(prompt) :])
    return [known[asked] for asked in load]


def decoded(tokenizer: Any, prompt: Sequence[int], made: list[int]) -> str:
    before = tokenizer.decode(list(prompt[-6:]), skip_special_tokens=True)
    return tokenizer.decode([*prompt[-6:], *made], skip_special_tokens=True)[len(before) :]


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def concurrent(server: Server, model: str, load: Sequence[Asked], count: int, expected: Sequence[str] | None) -> Row:
    """The load by many clients at once."""
    cpu, started = server.cpu(), time.perf_counter()
    found = asyncio.run(clients(server.url, model, load, count, None))
    seconds, cpu = time.perf_counter() - started, server.cpu() - cpu
    answers = [one for one in found if isinstance(one, tuple)]
    streamed = [times for text, times in answers if len(times) > 1]
    made = sum(most for _, most in load)
    row: Row = {
        "what": f"{count} clients, {len(load)} requests", "lost": len(found) - len(answers),
        "tokens_per_second": made / seconds, "tokens_per_cpu_second": made / cpu, "seconds": seconds,
        "first_p50": percentile([times[0] for times in streamed], 0.5),
        "first_p99": percentile([times[0] for times in streamed], 0.99),
    }  # fmt: skip
    gaps = [later - earlier for times in streamed for earlier, later in itertools.pairwise(times)]
    row |= {"token_p50": percentile(gaps, 0.5), "token_p99": percentile(gaps, 0.99)}
    if expected is not None:
        row["equal"] = sum(one[0] == text for one, text in zip(found, expected) if isinstance(one, tuple))
        row["ok"] = row["lost"] == 0 and row["equal"] == len(load)
    if lost := [one for one in found if not isinstance(one, tuple)]:
        row["first_loss"] = repr(lost[0])[:200]
    return row


def one_by_one(server: Server, model: str, load: Sequence[Asked]) -> Row:
    """The load by one client: what batching is compared with."""
    return concurrent(server, model, load, 1, None)


def hostile(server: Server, model: str) -> list[Row]:
    """What is no request, and connections that are not what they should be: a clear refusal or a closed connection, and
    the next request is served."""
    body = {"model": model, "prompt": "def ", "max_tokens": 4, "temperature": 0}
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    stream = json.dumps({**body, "max_tokens": 900, "stream": True})
    cases: dict[str, Any] = {
        "malformed JSON": b'{"model": ', "no object": b"[]", "unknown model": {**body, "model": "x"},
        "negative max_tokens": {**body, "max_tokens": -1}, "huge prompt": {**body, "prompt": "word " * 200_000},
        "body above the limit": b" " * (5 << 20), "deep nesting": b"[" * 500_000,
    }  # fmt: skip
    connections = {
        "half a head": "POST /v1/comp", "half a body": f"{head}5000\r\n\r\n{{", "no HTTP": "\x00\x16\x03\r\n\r\n",
        "dropped in a stream": f"{head}{len(stream)}\r\n\r\n{stream}",
        "a head of 1 MB": "GET / HTTP/1.1\r\nA: " + "a" * (1 << 20),
    }  # fmt: skip
    rows = []
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for what, content in cases.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        answer = httpx2.post(
            f"{server.url}/v1/completions", content=raw, headers={"content-type": "application/json"}, timeout=120
        )
        rows.append({"what": what, "status": answer.status_code, "said": answer.json()["error"]["message"][:90]})
        rows[-1]["ok"] = 400 <= answer.status_code < 500 and _serves(server, body)
    for what, text in connections.items():
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            try:
                connection.sendall(text.encode("latin-1"))
                connection.settimeout(0.5)
                connection.recv(100)
            except OSError:
                pass
        rows.append({"what": what, "ok": _serves(server, body)})
    rows.append({"what": "200 idle connections", "ok": _serves(server, body)})
    for connection in idle:
        connection.close()
    return rows


def _serves(server: Server, body: dict[str, Any]) -> bool:
    return httpx2.post(f"{server.url}/v1/completions", json=body, timeout=120).status_code == 200


def memory(server: Server, model: str, many: int) -> Row:
    """Anonymous memory after many requests beside that after a hundred."""

    def anonymous() -> float:
        return server.watched.memory_full_info().uss / 1e6

    load = [((5 + index % 50, 7, 9), 1 + index % 3) for index in range(many)]
    asyncio.run(clients(server.url, model, load[:100], 32, None))
    before = anonymous()
    found = asyncio.run(clients(server.url, model, load, 32, None))
    lost = sum(not isinstance(one, tuple) for one in found)
    after = anonymous()
    # What a leak of one request's cache would add, many times over, is far above this.
    return {
        "what": f"{many} requests", "lost": lost, "mb_after_100": before, "mb_after": after,
        "ok": lost == 0 and after - before < 0.05 * before + 4,
    }  # fmt: skip


def schemathesis(server: Server, folder: Path) -> Row:
    """Requests made from the server's own description: no status 5xx."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error",
        "--max-examples", "25", "--seed", "1", "--request-timeout", "600",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / "schemathesis.log").write_text(done.stdout + done.stderr)
    counts = httpx2.get(f"{server.url}/metrics").text
    said = [line.strip() for line in done.stdout.splitlines() if "generated" in line]
    said += [line.split("_total")[1] for line in counts.splitlines() if line.startswith("slimwright_http_responses_")]
    failed = 'status="5' in counts
    return {"what": "schemathesis", "said": "; ".join(said), "ok": done.returncode == 0 and not failed}


def official_client(server: Server, model: str) -> Row:
    """The openai package's own client."""
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    names = [found.id for found in client.models.list()]
    how: dict[str, Any] = {"model": model, "prompt": "import os\n", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**how)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**how, stream=True)]
    try:
        client.completions.create(**{**how, "model": "none"})
        refused = False
    except openai.NotFoundError as error:
        refused = error.code == "model_not_found"
    ok = model in names and whole.choices[0].text == "".join(pieces) and refused and whole.usage is not None
    return {"what": f"openai {openai.__version__}", "ok": ok}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--longest", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["load", "hostile", "memory", "schema", "beside"])
    parser.add_argument("--llama-server")
    parser.add_argument("--gguf")
    asked = parser.parse_args()
    started, rows = time.time(), list[Row]()
    with scratch("serving") as folder:
        directory = asked.model or str(folder / "model")
        if asked.model is None:
            slimwright.fit(bundled_path(), directory, grid="int4:g32", data="none")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = Path(directory).resolve().name
        ours = [
            sys.executable, "-m", "slimwright", "serve", directory, "--slots", str(SLOTS), "--queue", "1000",
            "--dtype", asked.dtype,
        ]  # fmt: skip
        distinct = load_of(tokenizer, max(1, asked.clients * asked.requests // 4), asked.longest, asked.tokens)
        load = [distinct[index % len(distinct)] for index in range(asked.clients * asked.requests)]
        with running(ours, folder / "ours.log") as server:
            if asked.only in (None, "load"):
                expected = alone(directory, tokenizer, load) if asked.dtype == "float32" else None
                rows.append(concurrent(server, model, load, asked.clients, expected))
                rows.append(one_by_one(server, model, load[:: max(1, len(load) // 40)]))
            if asked.only in (None, "hostile"):
                rows += hostile(server, model)
            if asked.only in (None, "memory"):
                rows.append(memory(server, model, asked.many))
        if asked.only in (None, "schema"):
            with running([*ours, "--context", "48"], folder / "described.log") as server:
                checks = {
                    "openai": lambda: official_client(server, model),
                    "schemathesis": lambda: schemathesis(server, folder),
                }
                for name, check in checks.items():
                    there = importlib.util.find_spec(name) is not None
                    rows.append(check() if there else {"what": f"{name}: not installed"})
        if asked.llama_server and asked.gguf:
            rows += beside(ours, asked, model, load, folder)
        logs = Path("bench-results")
        logs.mkdir(exist_ok=True)
        for log in folder.glob("*.log"):
            shutil.copy(log, logs / f"serving-{log.name}")
    columns = {
        "what": "what", "lost": "lost", "equal": "equal to alone", "tokens_per_second": "tokens/s",
        "tokens_per_cpu_second": "tokens/CPU s", "first_p50": "first p50", "first_p99": "first p99",
        "token_p50": "token p50", "token_p99": "token p99", "mb_after_100": "MB at 100", "mb_after": "MB after",
        "status": "status", "said": "said", "ok": "ok",
    }  # fmt: skip
    publish("serving", rows, columns, started)
    return exit_code(rows)


def beside(ours: Sequence[str], asked: Any, model: str, load: Sequence[Asked], folder: Path) -> list[Row]:
    """The same load at both servers, in turns, each with the same slots and threads; neither keeps prompts."""
    threads = str(torch.get_num_threads())
    context = str(SLOTS * (asked.longest + asked.tokens + 8))
    theirs = [
        asked.llama_server, "-m", asked.gguf, "-np", str(SLOTS), "-t", threads, "-tb", threads, "-c", context,
        "--cache-ram", "0", "--no-cache-prompt", "--no-webui",
    ]  # fmt: skip
    speeds: dict[str, list[Row]] = {"slimwright": [], "llama-server": []}
    for number in range(asked.rounds):
        for name, command in (("slimwright", ours), ("llama-server", theirs)):
            with running(command, folder / f"{name}-{number}.log") as server:
                asyncio.run(clients(server.url, model, load[:8], 4, None))
                speeds[name].append(concurrent(server, model, load, asked.clients, None))
    rows = []
    for name, found in speeds.items():
        keys = [key for key, value in found[0].items() if isinstance(value, float)]
        rows.append({"what": f"{name}, median of {len(found)}", "lost": sum(row["lost"] for row in found)})
        rows[-1] |= {key: statistics.median(row[key] for row in found) for key in keys}
        rows[-1]["said"] = next((row["first_loss"] for row in found if "first_loss" in row), "")
    ratio = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    rows.append({"what": "slimwright / llama-server", "tokens_per_second": ratio, "ok": ratio >= 0.8})
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
