"""A served model in this process, asked through ASGI without a socket."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from slimwright.serving.app import create_app
from slimwright.serving.limits import Limits
from slimwright.serving.served import Served


class _Same:
    """A model as a key."""

    def __init__(self, served: Served) -> None:
        self.served = served

    def __hash__(self) -> int:
        return id(self.served)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.served is self.served


@functools.cache
def _app(served: _Same, limits: Limits, key: str | None, hosts: frozenset[str] | None) -> Any:
    return create_app(served.served, limits, key, hosts)


@asynccontextmanager
async def client(served: Served, **how: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of a server with these limits, key and hosts."""
    app = _app(_Same(served), how.pop("limits", Limits()), how.pop("key", None), how.pop("hosts", None))
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", timeout=60, **how) as made:
        yield made


def ask(served: Served, asking: Callable[[httpx2.AsyncClient], Coroutine[Any, Any, Any]], **how: Any) -> Any:
    """What a coroutine finds that is given a client."""

    async def whole() -> Any:
        async with client(served, **how) as made:
            return await asking(made)

    return asyncio.run(whole())


def post(served: Served, path: str, body: dict[str, Any], **how: Any) -> httpx2.Response:
    return ask(served, lambda made: made.post(path, json=body), **how)


def get(served: Served, path: str, **how: Any) -> httpx2.Response:
    return ask(served, lambda made: made.get(path), **how)


def events(text: str) -> list[Any]:
    """The objects of a stream of server-sent events, which ends as OpenAI's do."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def refusal(answer: httpx2.Response, status: int) -> str:
    """The sentence of a refusal in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert isinstance(message, str) and message.endswith(".") and "\n" not in message
    return message
