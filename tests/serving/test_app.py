"""The endpoints as a client sees them: OpenAI's shapes, answers equal to the model's own, refusals in one sentence."""

import asyncio
import base64
import copy
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimwright.errors import InputError
from slimwright.serving.limits import Limits
from slimwright.serving.requests import Request
from slimwright.serving.served import Served, load_served
from slimwright.zoo import bundled_path, minilm_path
from tests.families import cached
from tests.serving.serving import ask, events, get, post, refusal

PROMPT = "import os\nfor name in os."
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    made = load_served(str(bundled_path()), dtype="float32", slots=4, queue=8)
    yield made
    made.stop(0)


@pytest.fixture(scope="module")
def encoder() -> Iterator[Served]:
    made = load_served(str(minilm_path()), dtype="float32")
    yield made
    made.stop()


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(bundled_path())


def asked(served: Served, **more: Any) -> dict[str, Any]:
    return {"model": served.name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **more}


def greedy(plain: tuple[Any, Any], text: str, most: int) -> str:
    model, tokenizer = plain
    ids = torch.tensor([tokenizer(text).input_ids])
    out = model.generate(ids, max_new_tokens=most, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(out)[len(tokenizer.decode(ids[0])) :]


def test_a_completion(served: Served, plain: tuple[Any, Any]) -> None:
    answer = post(served, "/v1/completions", asked(served))
    found = answer.json()
    assert answer.status_code == 200 and found["object"] == "text_completion" and found["model"] == served.name
    assert found["choices"] == [
        {"index": 0, "text": greedy(plain, PROMPT, 8), "finish_reason": "length", "logprobs": None}
    ]
    count = len(plain[1](PROMPT).input_ids)
    assert found["usage"] == {"prompt_tokens": count, "completion_tokens": 8, "total_tokens": count + 8}


def test_prompts_as_lists_and_tokens(served: Served, plain: tuple[Any, Any]) -> None:
    ids = plain[1](PROMPT).input_ids
    for prompt in ([PROMPT, "def "], [ids, plain[1]("def ").input_ids]):
        choices = post(served, "/v1/completions", asked(served, prompt=prompt)).json()["choices"]
        assert [choice["text"] for choice in choices] == [greedy(plain, PROMPT, 8), greedy(plain, "def ", 8)]
        assert [choice["index"] for choice in choices] == [0, 1]
    one = post(served, "/v1/completions", asked(served, prompt=ids)).json()
    assert one["choices"][0]["text"] == greedy(plain, PROMPT, 8)


def test_a_stream_is_the_answer_in_pieces(served: Served) -> None:
    whole = post(served, "/v1/completions", asked(served, n=2, temperature=1, seed=3, logprobs=2)).json()
    body = asked(
        served, n=2, temperature=1, seed=3, logprobs=2, stream=True, stream_options={"include_usage": True}
    )  # fmt: skip
    answer = post(served, "/v1/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(answer.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1 and all(chunk["usage"] is None for chunk in chunks)
    for index, choice in enumerate(whole["choices"]):
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for key, value in choice["logprobs"].items():
            assert [v for part in parts if part["logprobs"] for v in part["logprobs"][key]] == value
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]  # choices have seeds of their own


def test_stop_strings(served: Served, plain: tuple[Any, Any]) -> None:
    whole = greedy(plain, PROMPT, 12)
    for stop in (whole[6:9], [whole[6:9], "never"]):
        choice = post(served, "/v1/completions", asked(served, max_tokens=12, stop=stop)).json()["choices"][0]
        assert choice["text"] == whole.partition(whole[6:9])[0] and choice["finish_reason"] == "stop"


@pytest.fixture
def chatting(served: Served) -> Served:
    made = copy.copy(served)
    made.tokenizer = copy.deepcopy(served.tokenizer)
    made.tokenizer.chat_template = TEMPLATE
    return made


def test_a_chat(chatting: Served, plain: tuple[Any, Any]) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Read "}, {"type": "text", "text": "a file"}]},
    ]
    body = {"model": chatting.name, "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    found = post(chatting, "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 2}).json()
    assert found["object"] == "chat.completion"
    choice = found["choices"][0]
    text = greedy(plain, "system: Be brief.\nuser: Read a file\nassistant:", 6)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "length" and len(choice["logprobs"]["content"]) == 6
    first = choice["logprobs"]["content"][0]
    assert bytes(first["bytes"]).decode() == first["token"] and len(first["top_logprobs"]) == 2
    chunks = events(post(chatting, "/v1/chat/completions", {**body, "stream": True}).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_a_chat_may_use_all_of_the_context(chatting: Served) -> None:
    chatting.context = 40
    body = {"model": chatting.name, "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    found = post(chatting, "/v1/chat/completions", body).json()
    assert found["usage"]["total_tokens"] <= 40
    chatting.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in refusal(post(chatting, "/v1/chat/completions", body), 400)


def test_embeddings(encoder: Served) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["How do I open a file?", "The weather is fine", "a " * 100]
    expected = SentenceTransformer(str(minilm_path()), device="cpu").encode(texts)
    body = {"model": encoder.name, "input": texts}
    found = post(encoder, "/v1/embeddings", body).json()
    assert [one["index"] for one in found["data"]] == [0, 1, 2] and found["usage"]["prompt_tokens"] > 100
    for one, vector in zip(found["data"], expected):
        assert torch.allclose(torch.tensor(one["embedding"]), torch.from_numpy(vector), atol=1e-5)
    packed = post(encoder, "/v1/embeddings", {**body, "encoding_format": "base64"}).json()["data"][0]["embedding"]
    raw = base64.b64decode(packed)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(found["data"][0]["embedding"], abs=1e-7)


def test_what_a_model_does_not_do(served: Served, encoder: Served) -> None:
    body = {"model": encoder.name, "input": "word " * 600}
    assert "too long" in refusal(post(encoder, "/v1/embeddings", body), 400)
    assert "384" in refusal(post(encoder, "/v1/embeddings", {**body, "input": "a", "dimensions": 7}), 400)
    assert "no encoder" in refusal(post(served, "/v1/embeddings", {"model": served.name, "input": "a"}), 400)
    assert "embeddings" in refusal(post(encoder, "/v1/completions", {"model": encoder.name, "prompt": "a"}), 400)
    chat = {"model": served.name, "messages": [{"role": "user", "content": "a"}]}
    assert "no chat template" in refusal(post(served, "/v1/chat/completions", chat), 400)
    with pytest.raises(InputError, match="not served"):
        load_served(str(cached("t5")))


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "There is no model 'other'"),
        ({"max_tokens": -1}, 400, "'max_tokens'"),
        ({"max_tokens": 0}, 400, "'max_tokens'"),
        ({"max_tokens": 5000}, 400, "context is 1024"),
        ({"prompt": "word " * 3000}, 400, "context is 1024"),
        ({"prompt": [5, 99999]}, 400, "no token 99999"),
        ({"prompt": [-1]}, 400, "'prompt.0'"),
        ({"prompt": []}, 400, "'prompt'"),
        ({"prompt": {}}, 400, "'prompt'"),
        ({"prompt": "\ud800"}, 400, "surrogate"),
        ({"temperature": -0.5}, 400, "'temperature'"),
        ({"temperature": "hot"}, 400, "'temperature'"),
        ({"top_p": 0}, 400, "'top_p'"),
        ({"n": 100}, 400, "'n'"),
        ({"stop": ["a"] * 5}, 400, "'stop'"),
        ({"stop": ""}, 400, "'stop'"),
        ({"logprobs": 6}, 400, "'logprobs'"),
        ({"seed": 1 << 70}, 400, "'seed'"),
        ({"presence_penalty": 1}, 400, "not served"),
        ({"logit_bias": {"5": 1}}, 400, "not served"),
        ({"best_of": 3}, 400, "'best_of'"),
        ({"grammar\ud800": "x"}, 400, ""),
        ({"grammar": "x"}, 400, "'grammar' is not served"),
    ],
)
def test_refusals(served: Served, change: dict[str, Any], status: int, words: str) -> None:
    """Each is one sentence, and the next request is served."""
    body = json.dumps(asked(served, **change))
    how = {"content": body, "headers": {"content-type": "application/json"}}
    assert words in refusal(ask(served, lambda made: made.post("/v1/completions", **how)), status)


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"null", b'{"model": NaN}', b"\xff\xfe", b"[" * 100_000, b"1e999"])
def test_bodies_that_are_no_request(served: Served, body: bytes) -> None:
    how = {"content": body, "headers": {"content-type": "application/json"}}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/adapters"):
        refusal(ask(served, lambda made, path=path: made.post(path, **how)), 400)
    assert post(served, "/v1/completions", asked(served, max_tokens=1)).status_code == 200


def test_limits(served: Served) -> None:
    small = Limits(body=200, body_seconds=0.05)
    assert "200 bytes" in refusal(post(served, "/v1/completions", asked(served, prompt="a" * 300), limits=small), 413)

    async def endless() -> Any:
        while True:
            yield b" " * 50

    async def never() -> Any:
        yield b"{"
        await asyncio.sleep(30)

    for content, status in ((endless, 413), (never, 408)):
        how = {"content": content(), "headers": {"content-type": "application/json"}}
        answer = ask(served, lambda made, how=how: made.post("/v1/completions", **how), limits=small)
        refusal(answer, status)
    late = post(served, "/v1/completions", asked(served, max_tokens=900), limits=Limits(seconds=0.0))
    assert "took longer" in refusal(late, 408)
    stream = post(served, "/v1/completions", asked(served, max_tokens=900, stream=True), limits=Limits(seconds=0.0))
    assert "took longer" in events(stream.text)[-1]["error"]["message"]
    plain = ask(
        served, lambda made: made.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    )
    assert "application/json" in refusal(plain, 415)


def test_a_full_queue_answers_429(served: Served) -> None:
    async def go(client: Any) -> list[Any]:
        bodies = [asked(served, n=12, max_tokens=40)] * 2
        return list(await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies)))

    _, answer = sorted(ask(served, go), key=lambda found: found.status_code)
    assert "try again" in refusal(answer, 429) and answer.headers["retry-after"]
    said = refusal(post(served, "/v1/completions", asked(served, n=13)), 400)
    assert "13 texts are asked for in one request" in said


def test_keys(served: Served) -> None:
    how = {"key": "s3cret"}
    assert get(served, "/health", **how).status_code == 200
    for path in ("/v1/models", "/metrics", "/", "/report", "/v1/adapters", "/openapi.json"):
        answer = get(served, path, **how)
        assert "API key" in refusal(answer, 401) and answer.headers["www-authenticate"]
    for given in ("Bearer other", "Bearer", "Basic !", "Basic " + base64.b64encode(b"me:other").decode(), "s3cret"):
        refusal(get(served, "/v1/models", **how, headers={"authorization": given}), 401)
    for given in ("Bearer s3cret", "bearer s3cret", "Basic " + base64.b64encode(b"me:s3cret").decode()):
        assert get(served, "/v1/models", **how, headers={"authorization": given}).status_code == 200


def test_other_names_of_the_server(served: Served) -> None:
    """A page of another site that points its own name here gets nothing."""
    hosts = frozenset({"localhost", "127.0.0.1", "[::1]"})
    for name, status in (("localhost:8000", 200), ("[::1]:8000", 200), ("evil.example", 403), ("", 403)):
        assert get(served, "/v1/models", hosts=hosts, headers={"host": name}).status_code == status


def test_models_metrics_and_unknown_paths(served: Served) -> None:
    listed = get(served, "/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [served.name] and listed["object"] == "list"
    assert get(served, f"/v1/models/{served.name}").json() == listed["data"][0]
    refusal(get(served, "/v1/models/none"), 404)
    refusal(get(served, "/v1/nothing"), 404)
    described = get(served, "/openapi.json").json()["components"]["schemas"]
    assert described["ChatBody"]["properties"]["model"]["enum"] == [served.name]
    refusal(get(served, "/v1/completions"), 405)
    before = _figures(get(served, "/metrics").text)
    post(served, "/v1/completions", asked(served))
    after = _figures(get(served, "/metrics").text)
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["slimwright_generated_tokens_total"] == 8
    assert grown['slimwright_http_responses_total{status="200"}'] == 2
    assert grown['slimwright_finished_total{reason="length"}'] == 1
    assert grown["slimwright_first_token_seconds_count"] == 1 and grown["slimwright_between_tokens_seconds_count"] == 7
    assert after["slimwright_running"] == after["slimwright_waiting"] == 0


def _figures(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_many_clients_at_once(served: Served, plain: tuple[Any, Any]) -> None:
    """Streams and whole answers of mixed lengths beside each other: each is the text alone."""
    texts = ["def f(", "class A", PROMPT, "import "]

    async def all_of_them(made: httpx2.AsyncClient) -> list[str]:
        async def one(index: int) -> str:
            body = asked(served, prompt=texts[index % 4], max_tokens=2 + index, stream=index % 2 == 0)
            answer = await made.post("/v1/completions", json=body)
            found = events(answer.text) if body["stream"] else [answer.json()]
            return "".join(choice["text"] for event in found for choice in event["choices"])

        return await asyncio.gather(*(one(index) for index in range(8)))

    got = ask(served, all_of_them)
    assert got == [greedy(plain, texts[index % 4], 2 + index) for index in range(8)]


def test_a_client_that_goes_frees_its_slot(served: Served) -> None:
    """Streaming or not: its text is given up long before its end."""
    for stream in (True, False):

        async def go(made: httpx2.AsyncClient, stream: bool = stream) -> None:
            from slimwright.serving.app import create_app

            app, gone, begun = create_app(served, Limits()), asyncio.Event(), asyncio.Event()
            body = json.dumps(asked(served, max_tokens=1000, stream=stream)).encode()
            messages = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(message: dict[str, Any]) -> None:
                begun.set()

            scope = {
                "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
                "query_string": b"", "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
                "http_version": "1.1", "scheme": "http", "server": ("localhost", 80), "client": ("localhost", 1),
                "root_path": "",
            }  # fmt: skip
            task = asyncio.create_task(app(scope, receive, send))
            assert served.engine is not None
            while not (begun.is_set() if stream else served.engine._running):
                await asyncio.sleep(0.001)
            gone.set()
            await task

        made = served.metrics.generated_tokens.values[""]
        ask(served, go)
        assert served.engine is not None
        served.engine.call(lambda: None).result()  # one iteration later
        served.engine.call(lambda: None).result()
        assert not served.engine._running
        assert served.metrics.generated_tokens.values[""] - made < 900


def test_an_answer_that_fails_is_a_sentence(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise MemoryError

    assert served.engine is not None
    monkeypatch.setattr(served.engine.batcher, "run", failing)
    assert "not enough memory" in refusal(post(served, "/v1/completions", asked(served)), 500)


def test_requests_have_sane_defaults(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's: 16 tokens, temperature 1."""
    taken: list[Request] = []
    assert served.engine is not None
    submit = served.engine.submit
    monkeypatch.setattr(served.engine, "submit", lambda asked: (taken.extend(r for r, _ in asked), submit(asked))[1])
    assert post(served, "/v1/completions", {"model": served.name, "prompt": "a"}).status_code == 200
    assert (taken[0].most, taken[0].sampling.temperature, taken[0].sampling.top_p) == (16, 1.0, 1.0)


def test_settings_that_a_model_cannot_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        load_served(str(tmp_path / "none"))
    with pytest.raises(InputError, match="--dtype 'int8'"):
        load_served(str(bundled_path()), dtype="int8")
    with pytest.raises(InputError, match="--context is 5000, but the model takes 1024"):
        load_served(str(bundled_path()), context=5000)
