"""Errors as HTTP answers in OpenAI's JSON shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from slimwright.errors import SlimwrightError
from slimwright.report.words import printable

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}


class HttpError(SlimwrightError):
    """A refusal with its status.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field that is wrong.
        code: OpenAI's, where it has one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": _plain(message), "type": kind, "param": param and _plain(param), "code": code}}


def response(
    status: int, message: str, param: str | None = None, code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:  # fmt: skip
    return JSONResponse(body(status, message, param, code), status, headers and dict(headers))


def sentence(errors: Sequence[Any]) -> tuple[str, str | None]:
    """What pydantic found wrong in a body, and in which field: of the first field's errors the most particular one."""
    first = max((error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]), key=lambda e: len(e["loc"]))
    place = [part for part in first["loc"] if part != "body"]
    kind = first["type"]
    if kind == "json_invalid":
        return "The body is not valid JSON: send one JSON object.", None
    names = [part for part in place if not (isinstance(part, str) and ("[" in part or part in ("str", "int")))]
    field = ".".join(str(part) for part in names) or None
    if kind == "extra_forbidden":
        return f"The field '{field}' is not served by this server: leave it out.", field
    if kind == "missing":
        return (f"The field '{field}' is missing." if field else "A JSON object is expected as the body."), field
    what = str(first["msg"]).removeprefix("Value error, ")
    return (f"'{field}': {what}." if field else f"The body is wrong: {what}."), field


def _plain(text: str) -> str:
    """One line that can be encoded, whatever a client sent."""
    return printable(text, 1000).encode("utf-8", "replace").decode()
