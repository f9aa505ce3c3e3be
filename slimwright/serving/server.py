"""``slimwright serve``: a model behind a socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from slimwright.errors import InputError
from slimwright.sizes import parse_bytes

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
KEY_VARIABLE = "SLIMWRIGHT_API_KEY"
HEAD_SECONDS = 20.0
"""In which the head of a request must have come."""
MOST_CONNECTIONS = 1000


def serve(
    directory: str,
    *,
    adapters: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    slots: int = 16,
    queue: int = 256,
    context: int | None = None,
    time_limit: float = 600.0,
    max_body: str = "4MB",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Serve a model until SIGINT or SIGTERM comes, then finish what runs.

    Args:
        directory: a result of ours, or any causal language model or encoder that transformers loads.
        adapters: ``NAME=DIRECTORY`` of LoRA adapters; requests choose one by its name.
        host: address to listen at; other than this machine's own only with a key.
        port: 0 takes a free one.
        api_key: that requests must bring; None: the environment's SLIMWRIGHT_API_KEY, if any.
        slots: texts that run at once.
        queue: texts that may wait; more are refused with status 429.
        context: tokens of prompt and answer, at most (default: the model's positions).
        time_limit: seconds that a request may take, waiting included.
        max_body: bytes of a request's body.
        dtype: float32, bfloat16, float16 or auto (as stored).
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        InputError: what is given cannot work: no model, an adapter of another base, a port in use, an open address
            without a key.
    """
    try:
        import uvicorn  # noqa: F401

        from slimwright.serving.app import create_app
    except ImportError as error:
        raise InputError(f"The server needs {error.name}: `pip install 'slimwright[serve]'`.") from error
    from slimwright.serving.limits import Limits
    from slimwright.serving.served import load_served

    key = api_key or os.environ.get(KEY_VARIABLE) or None
    for name, value, least in (("slots", slots, 1), ("queue", queue, 0), ("context", context, 2)):
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}: give at least {least}.")
    if not time_limit > 0:
        raise InputError(f"--time-limit is {time_limit:g}: give a number of seconds above 0.")
    if host not in LOOPBACK and key is None:
        raise InputError(
            f"--host {host} opens the server to other machines: give --api-key (or {KEY_VARIABLE}), or leave it out."
        )
    pairs = [_pair(given) for given in adapters]
    limits = Limits(body=parse_bytes(max_body, "--max-body"), seconds=time_limit)
    with contextlib.closing(_listening(host, port)) as listening:
        served = load_served(
            directory, slots=slots, queue=queue, context=context, dtype=dtype, trust_remote_code=trust_remote_code
        )
        try:
            for name, path in pairs:
                served.add_adapter(name, path)
            hosts = frozenset({"localhost", "127.0.0.1", "[::1]", host}) if host in LOOPBACK else None
            _run(create_app(served, limits, key, hosts), listening, limits.seconds, served)
        finally:
            served.stop(0)


def _pair(given: str) -> tuple[str, str]:
    name, equals, path = given.partition("=")
    if not equals or not name or not path:
        raise InputError(f"--adapter '{given}' is not NAME=DIRECTORY.")
    return name, path


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything is loaded.

    Raises:
        InputError: the address cannot be had.
    """
    if not 0 <= port < 65536:
        raise InputError(f"--port is {port}: give 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"--host {host} is no address of this machine ({error.strerror}).") from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        raise InputError(
            f"Port {port} of {host} cannot be had ({error.strerror}): choose another with --port, or 0 for a free one."
        ) from error
    return made


def bounded_protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1, which closes connections that do not bring the head of a request in time, and those beyond a
    number."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Bounded(H11Protocol):
        _head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > MOST_CONNECTIONS:
                transport.abort()
                return
            self._wait_for_head()

        def data_received(self, data: bytes) -> None:
            if self._head is None and (self.cycle is None or self.cycle.response_complete):
                self._wait_for_head()
            super().data_received(data)

        def handle_events(self) -> None:
            super().handle_events()
            if self._head is not None and self.cycle is not None and not self.cycle.response_complete:
                self._head.cancel()
                self._head = None

        def connection_lost(self, exc: Exception | None) -> None:
            if self._head is not None:
                self._head.cancel()
            super().connection_lost(exc)

        def _wait_for_head(self) -> None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._too_slow)

        def _too_slow(self) -> None:
            self._head = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Bounded


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """uvicorn raises the signal that stopped it again when all is done; here that is no interruption."""
    with contextlib.suppress(KeyboardInterrupt):
        yield


def _run(app: Any, listening: socket.socket, seconds: float, served: Any) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            address, port = listening.getsockname()[:2]
            where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
            print(f"Serving {served.name} at {where} (Ctrl-C finishes what runs, then stops)", flush=True)

    config = uvicorn.Config(
        app, http=bounded_protocol(), ws="none", lifespan="on", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=int(seconds) + 10,
        h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    with own_signals():
        Server(config).run(sockets=[listening])
