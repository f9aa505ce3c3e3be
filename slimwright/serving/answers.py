"""Between the engine's thread and HTTP: pieces as they come, given up when their client goes."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from slimwright.serving import failures
from slimwright.serving.engine import Engine
from slimwright.serving.failures import HttpError
from slimwright.serving.requests import Piece, Request, TokenScore

_T = TypeVar("_T")
_WRITE_SECONDS = 60.0
"""Beyond the time of a request, for a client that reads slowly."""


@dataclass
class Answer:
    """A whole text."""

    text: str = ""
    tokens: int = 0
    scores: list[TokenScore] = field(default_factory=list)
    finish: str = ""


class Answers:
    """The texts that one HTTP request asks for.

    Raises:
        BusyError: they are not taken.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._count = len(requests)
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._tickets = engine.submit([(r, functools.partial(self._deliver, i)) for i, r in enumerate(requests)])

    def _deliver(self, index: int, piece: Piece) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    def cancel(self) -> None:
        """Give up all that has not ended."""
        for ticket in self._tickets:
            ticket.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(which text, piece) as they come.

        Raises:
            HttpError: one of them failed; the others are given up.
        """
        left = self._count
        try:
            while left:
                index, piece = await self._pieces.get()
                _raise_for(piece)
                left -= piece.finish is not None
                yield index, piece
        finally:
            if left:
                self.cancel()

    async def whole(self) -> list[Answer]:
        """All texts."""
        answers = [Answer() for _ in range(self._count)]
        async for index, piece in self.pieces():
            answer = answers[index]
            answer.text += piece.text
            answer.tokens += piece.tokens
            answer.scores += piece.scores
            answer.finish = piece.finish or ""
        return answers


def _raise_for(piece: Piece) -> None:
    if piece.finish == "timeout":
        raise HttpError(408, "The request took longer than this server allows: ask for fewer tokens, or try later.")
    if piece.finish == "error":
        raise HttpError(500, piece.error)
    if piece.finish == "cancelled":
        raise HttpError(503, "The server stopped before the answer was complete.")


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of some work, which is cancelled when the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """
    return await _first(work, _gone(request.receive))


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Coroutine[Any, Any, _T], gone: Coroutine[Any, Any, None]) -> _T:
    tasks: tuple[asyncio.Task[_T], asyncio.Task[None]] = (asyncio.create_task(work), asyncio.create_task(gone))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: one JSON object each, then ``[DONE]``.

    Args:
        events: the objects; closed when the client goes. An :class:`HttpError` becomes the last event.
        seconds: that a request may take.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], seconds: float) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds = events, seconds + _WRITE_SECONDS

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await _first(self._send(send), _gone(receive))
        except (ClientDisconnect, TimeoutError):
            pass  # nobody reads what would be said

    async def _send(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": _event(json.dumps(event)), "more_body": True})
        except HttpError as error:
            said = failures.body(error.status, str(error), error.param, error.code)
            await send({"type": "http.response.body", "body": _event(json.dumps(said)), "more_body": True})
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
        await send({"type": "http.response.body", "body": _event("[DONE]"), "more_body": False})


def _event(text: str) -> bytes:
    return f"data: {text}\n\n".encode()
