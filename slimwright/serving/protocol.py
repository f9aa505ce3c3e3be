"""The bodies of requests: OpenAI's fields that are served. What is not served is refused by name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_PROMPTS = 64
MOST_CHOICES = 16
MOST_TEXTS = 2048
MOST_TOKENS = 1 << 24


def _encodable(text: str) -> str:
    """JSON can write halves of characters, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is no text: it holds half a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]


class Body(BaseModel):
    """A JSON object whose fields are all known.

    ``user``, ``metadata``, ``store`` and ``service_tier`` change nothing in an answer and are taken without effect.
    """

    model_config = ConfigDict(extra="forbid")

    model: Text = Field(min_length=1, max_length=300, description="The model's name, or an adapter's.")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Generating(Body):
    """What both kinds of completion share."""

    temperature: Temperature | None = Field(None, description="1 if not given; 0 is greedy.")
    top_p: Share | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    max_tokens: Tokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, description="Only 0 is served.")
    presence_penalty: float | None = Field(None, description="Only 0 is served.")
    logit_bias: dict[str, float] | None = Field(None, description="Only none is served.")

    @field_validator("frequency_penalty", "presence_penalty", "logit_bias")
    @classmethod
    def _not_served(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not served by this server: leave it out")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionBody(Generating):
    """``/v1/completions``"""

    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = Field(description="Text, tokens, or a list of either.")
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)  # type: ignore[list-item]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One message; images and tool calls are not served."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ChatBody(Generating):
    """``/v1/chat/completions``"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class EmbeddingBody(Body):
    """``/v1/embeddings``"""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class AdapterBody(BaseModel):
    """``POST /v1/adapters``"""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    path: Text = Field(min_length=1, max_length=4096, description="A directory on the server's machine.")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's shape of an error."""

    error: ErrorDetail
