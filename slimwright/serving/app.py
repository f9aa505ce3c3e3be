"""The HTTP interface: OpenAI's endpoints over :class:`slimwright.serving.served.Served`, and a few of its own."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

import slimwright
from slimwright.errors import SlimwrightError
from slimwright.serving import failures, page
from slimwright.serving.answers import Answer, Answers, EventStream, unless_gone
from slimwright.serving.embeddings import as_base64
from slimwright.serving.failures import HttpError
from slimwright.serving.limits import Guard, Limits
from slimwright.serving.protocol import (
    AdapterBody,
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    ErrorBody,
    Generating,
)
from slimwright.serving.requests import BusyError, Piece, Request, Sampling, TokenScore
from slimwright.serving.served import Served

_log = logging.getLogger("slimwright.serving")
_DEFAULT_TOKENS = 16
"""Of /v1/completions, as OpenAI has it; a chat may use all of the context."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503)
}


def create_app(served: Served, limits: Limits, key: str | None = None, hosts: frozenset[str] | None = None) -> FastAPI:
    """The ASGI application. When it shuts down, it finishes what runs.

    Args:
        served: the model.
        limits: of every request.
        key: that requests must bring; None: none.
        hosts: see :class:`slimwright.serving.limits.Guard`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.stop, limits.seconds)

    app = FastAPI(
        title="slimwright", version=slimwright.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses=_ERRORS,
    )  # fmt: skip
    app.openapi = functools.partial(_openapi, app.openapi, served)  # type: ignore[method-assign]
    app.add_middleware(Guard, limits=limits, key=key, hosts=hosts, metrics=served.metrics)  # type: ignore[arg-type]
    _add_failures(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if served.engine is not None and not served.engine.alive:
            raise HttpError(503, "The engine does not run: the server is stopping, or has failed.")
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def front() -> Response:
        text, policy = page.front(served)
        return HTMLResponse(text, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    @app.get("/report", response_class=HTMLResponse)
    async def report() -> Response:
        text = page.report(served)
        if not text:
            raise HttpError(404, "The directory of this model holds no report.html.")
        return HTMLResponse(text, headers={"content-security-policy": page.REPORT_POLICY})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(_models(served))}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        served.adapter(name)
        return next(found for found in _models(served) if found["id"] == name)

    @app.get("/v1/adapters")
    async def adapters() -> dict[str, Any]:
        return {"object": "list", "data": [_described(adapter) for adapter in served.adapters.values()]}

    @app.post("/v1/adapters")
    async def load_adapter(body: AdapterBody) -> dict[str, Any]:
        return _described(await served.load_adapter(body.name, body.path))

    @app.delete("/v1/adapters/{name}")
    async def unload_adapter(name: str) -> dict[str, Any]:
        if served.adapters.pop(name, None) is None:
            raise HttpError(404, f"There is no adapter '{name}' here.", "name")
        return {"id": name, "object": "adapter", "deleted": True}

    @app.post("/v1/completions", response_class=JSONResponse)
    async def completions(body: CompletionBody, request: HttpRequest) -> Response:
        engine, adapter = served.texts(), served.adapter(body.model)
        prompts = await asyncio.to_thread(_prompts, served, body)
        made = [
            _request(served, body, tokens, body.max_tokens or _DEFAULT_TOKENS, body.logprobs, limits, choice)
            for tokens in prompts
            for choice in range(body.n or 1)
        ]
        answers = Answers(engine, [dataclasses.replace(one, adapter=adapter) for one in made])
        head = _head("cmpl", "text_completion", body.model)
        count = sum(len(tokens) for tokens in prompts)
        offsets = [0] * len(made)

        def choice(index: int, answer: Answer | Piece) -> dict[str, Any]:
            found = {"index": index, "text": answer.text, "finish_reason": answer.finish or None, "logprobs": None}
            if body.logprobs is not None and answer.scores:
                found["logprobs"], offsets[index] = _completion_scores(served, answer.scores, offsets[index])
            return found

        if not body.stream:
            whole = await unless_gone(request, answers.whole())
            choices = [choice(index, answer) for index, answer in enumerate(whole)]
            return JSONResponse({**head, "choices": choices, "usage": _usage(count, whole)})
        return EventStream(_events(answers, head, choice, body, count), limits.seconds)

    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat(body: ChatBody, request: HttpRequest) -> Response:
        engine, adapter = served.texts(), served.adapter(body.model)
        tokens = await asyncio.to_thread(_chat_prompt, served, body)
        most = body.max_completion_tokens or body.max_tokens or max(1, served.context - len(tokens))
        likeliest = (body.top_logprobs or 0) if body.logprobs else None
        made = [_request(served, body, tokens, most, likeliest, limits, choice) for choice in range(body.n or 1)]
        answers = Answers(engine, [dataclasses.replace(one, adapter=adapter) for one in made])

        def scores(answer: Answer | Piece) -> dict[str, Any] | None:
            return {"content": [_chat_score(served, one) for one in answer.scores]} if body.logprobs else None

        if not body.stream:
            whole = await unless_gone(request, answers.whole())
            choices = [
                {
                    "index": index, "message": {"role": "assistant", "content": answer.text, "refusal": None},
                    "finish_reason": answer.finish, "logprobs": scores(answer),
                }
                for index, answer in enumerate(whole)
            ]  # fmt: skip
            head = _head("chatcmpl", "chat.completion", body.model)
            return JSONResponse({**head, "choices": choices, "usage": _usage(len(tokens), whole)})

        def choice(index: int, piece: Answer | Piece) -> dict[str, Any]:
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if index not in begun:
                begun.add(index)
                delta = {"role": "assistant", "content": piece.text}
            return {"index": index, "delta": delta, "finish_reason": piece.finish or None, "logprobs": scores(piece)}

        begun: set[int] = set()
        head = _head("chatcmpl", "chat.completion.chunk", body.model)
        return EventStream(_events(answers, head, choice, body, len(tokens)), limits.seconds)

    @app.post("/v1/embeddings", response_class=JSONResponse)
    async def embeddings(body: EmbeddingBody, request: HttpRequest) -> Response:
        embedder = served.encoder()
        served.adapter(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        lengths = await asyncio.to_thread(embedder.lengths, texts)
        if max(lengths) > embedder.longest:
            raise HttpError(
                400, f"A text of {max(lengths)} tokens is too long: this model takes {embedder.longest}.", "input",
                "context_length_exceeded",
            )  # fmt: skip
        try:
            async with asyncio.timeout(limits.seconds):
                vectors = await unless_gone(request, embedder.embed(texts))
        except TimeoutError:
            raise HttpError(408, "The request took longer than this server allows: send fewer texts.") from None
        if body.dimensions not in (None, vectors.shape[1]):
            raise HttpError(
                400, f"This model's embeddings have {vectors.shape[1]} dimensions, no other number.", "dimensions"
            )
        write = as_base64 if body.encoding_format == "base64" else (lambda vector: vector.tolist())
        data = [{"object": "embedding", "index": i, "embedding": write(vector)} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    return app


def _openapi(described: Callable[[], dict[str, Any]], served: Served) -> dict[str, Any]:
    """The server's OpenAPI, which says by what names requests may call the model now."""
    found = copy.deepcopy(described())
    for schema in found["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"]["enum"] = [served.name, *served.adapters]
    return found


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> Response:
        return failures.response(400, *failures.sentence(error.errors()))

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        said = f"{request.method} {request.url.path}: {str(error.detail).lower()}."
        return failures.response(error.status_code, said, headers=error.headers)

    @app.exception_handler(SlimwrightError)
    async def known(_: HttpRequest, error: SlimwrightError) -> Response:
        if isinstance(error, HttpError):
            return failures.response(error.status, str(error), error.param, error.code)
        if isinstance(error, BusyError):
            return failures.response(429, str(error), code="busy", headers={"retry-after": "1"})
        return failures.response(400, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: HttpRequest, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it; it is counted

    @app.exception_handler(Exception)
    async def unexpected(_: HttpRequest, error: Exception) -> Response:
        return failures.response(500, f"An unexpected {type(error).__name__} in the server.")


def _models(served: Served) -> Iterator[dict[str, Any]]:
    own = {"object": "model", "created": served.created, "owned_by": "slimwright"}
    yield {"id": served.name, **own}
    for name in served.adapters:
        yield {"id": name, **own, "parent": served.name}


def _described(adapter: Any) -> dict[str, Any]:
    return {
        "id": adapter.name, "object": "adapter", "path": str(adapter.directory), "checked_by": adapter.checked,
        "base_model": adapter.base,
        "layers": len(adapter.changes), "bytes": adapter.nbytes,
    }  # fmt: skip


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _prompts(served: Served, body: CompletionBody) -> list[tuple[int, ...]]:
    found = []
    for prompt in body.prompts:
        tokens = tuple(served.tokenizer(prompt, verbose=False).input_ids if isinstance(prompt, str) else prompt)
        if not tokens and served.tokenizer.bos_token_id is not None:
            tokens = (served.tokenizer.bos_token_id,)
        if not tokens:
            raise HttpError(400, "The prompt is empty: give at least one token.", "prompt")
        if max(tokens) >= served.vocabulary:
            raise HttpError(400, f"There is no token {max(tokens)}: the model has {served.vocabulary}.", "prompt")
        found.append(tokens)
    return found


def _chat_prompt(served: Served, body: ChatBody) -> tuple[int, ...]:
    if not served.tokenizer.chat_template:
        raise HttpError(400, f"'{served.name}' has no chat template: use /v1/completions.", "messages")
    try:
        messages = [message.plain() for message in body.messages]
        text = served.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may refuse anything: roles that do not alternate, a system message
        raise HttpError(400, f"The model's chat template refuses these messages ({error}).", "messages") from error
    return tuple(served.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) or (0,)


def _request(
    served: Served, body: Generating, tokens: tuple[int, ...], most: int, logprobs: int | None, limits: Limits,
    choice: int,
) -> Request:  # fmt: skip
    if len(tokens) + most > served.context:
        raise HttpError(
            400, f"The prompt has {len(tokens)} tokens and {most} more are asked for, but this model's context is "
            f"{served.context}: shorten the prompt, or ask for fewer.", code="context_length_exceeded",
        )  # fmt: skip
    seed = None if body.seed is None else (body.seed + choice) % (1 << 63)
    sampling = Sampling(1.0 if body.temperature is None else body.temperature, body.top_p or 1.0, seed)
    return Request(
        tokens, most, sampling, body.stops, logprobs, stream=bool(body.stream), seconds=limits.seconds
    )  # fmt: skip


async def _events(
    answers: Answers, head: dict[str, Any], choice: Any, body: Generating, prompt_tokens: int
) -> AsyncIterator[dict[str, Any]]:
    usage = body.stream_options is not None and body.stream_options.include_usage
    more = {"usage": None} if usage else {}
    whole = Answer()
    pieces = answers.pieces()
    try:
        async for index, piece in pieces:
            whole.tokens += piece.tokens
            yield {**head, "choices": [choice(index, piece)], **more}
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]
    if usage:
        yield {**head, "choices": [], "usage": _usage(prompt_tokens, [whole])}


def _usage(prompt: int, answers: Sequence[Answer]) -> dict[str, int]:
    made = sum(answer.tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _completion_scores(served: Served, scores: Sequence[TokenScore], offset: int) -> tuple[dict[str, Any], int]:
    tokens = [served.tokenizer.decode([score.token]) for score in scores]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    likeliest = [{served.tokenizer.decode([token]): value for token, value in score.likeliest} for score in scores]
    found = {
        "tokens": tokens, "token_logprobs": [score.logprob for score in scores], "top_logprobs": likeliest,
        "text_offset": offsets,
    }  # fmt: skip
    return found, offset


def _chat_score(served: Served, score: TokenScore) -> dict[str, Any]:
    def one(token: int, value: float) -> dict[str, Any]:
        text = served.tokenizer.decode([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return {**one(score.token, score.logprob), "top_logprobs": [one(*pair) for pair in score.likeliest]}
