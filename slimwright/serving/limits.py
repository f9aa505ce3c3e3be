"""What stands before every endpoint: who may ask, how large a body may be, how long it may take to come.

Pure ASGI: a body is read whole, within its limits, before any endpoint sees the request.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from slimwright.serving import failures
from slimwright.serving.metrics import Metrics

OPEN_PATHS = frozenset({"/health"})
"""Served without a key."""
PAGES = frozenset({"/", "/report"})
"""Served to browsers, which ask their user for the key (as a password, under any name)."""

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """
    Attributes:
        body: bytes.
        body_seconds: in which a body must have come.
        seconds: that a request may take, waiting included.
    """

    body: int = 4 << 20
    body_seconds: float = 30.0
    seconds: float = 600.0


class Guard:
    """
    Args:
        app: what is guarded.
        limits: of a request.
        key: that is asked for; None: everyone may ask.
        hosts: names that a request may call this server by, so that no page of another site reaches it under its own
            name (DNS rebinding); None: any.
        metrics: to count in.
    """

    def __init__(
        self, app: Any, limits: Limits, key: str | None, hosts: frozenset[str] | None, metrics: Metrics
    ) -> None:
        self._app, self._limits, self._key, self._hosts, self._metrics = app, limits, key, hosts, metrics

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.add(label=str(message["status"]))
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused is None:
            try:
                async with asyncio.timeout(self._limits.body_seconds):
                    body = await self._body(headers, receive)
            except TimeoutError:
                refused = failures.response(408, f"The body did not come within {self._limits.body_seconds:g} s.")
            except ValueError as error:
                refused = failures.response(413, str(error))
            except ConnectionError:
                return
        if refused is not None:
            refused.headers["connection"] = "close"
            await refused(scope, receive, counted)  # type: ignore[arg-type]
            return
        await self._app(scope, _replayed(body, receive), counted)

    def _refusal(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> Any:
        """The answer to a request that goes no further; None: it does."""
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        if self._hosts is not None and name.lower() not in self._hosts:
            return failures.response(
                403, f"This server is not called '{name}': ask it as localhost, or start it with --host."
            )
        if not self._known(scope["path"], headers.get(b"authorization", b"")):
            challenge = {"www-authenticate": "Basic" if scope["path"] in PAGES else "Bearer"}
            return failures.response(
                401, "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key", headers=challenge,
            )  # fmt: skip
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] in ("POST", "PUT", "PATCH") and kind != b"application/json":
            # A page of another site can send other types without being asked, this one not.
            return failures.response(415, "The body must be JSON: send 'Content-Type: application/json'.")
        return None

    def _known(self, path: str, authorization: bytes) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        scheme, _, value = authorization.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                value = base64.b64decode(value, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(value.strip(), self._key.encode())

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """
        Raises:
            ValueError: it is too large; ConnectionError: the client has gone.
        """
        too_large = f"The body may have {self._limits.body:,} bytes: send less, or start the server with --max-body."
        told = headers.get(b"content-length", b"0")
        if told.isdigit() and int(told[:20]) > self._limits.body:
            raise ValueError(too_large)
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.body:
                raise ValueError(too_large)
            if not message.get("more_body"):
                return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> dict[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
