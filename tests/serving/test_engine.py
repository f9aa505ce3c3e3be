"""Texts that run together are the texts alone, whoever joins and leaves."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimwright
from slimwright.errors import InputError
from slimwright.kernels import packed
from slimwright.runtime.generate import Generation
from slimwright.runtime.kv_cache import attention_layers
from slimwright.runtime.kv_format import KvFormat
from slimwright.serving.batch import Batcher
from slimwright.serving.engine import Engine
from slimwright.serving.metrics import Metrics
from slimwright.serving.requests import BusyError, Piece, Request, Sampling
from slimwright.zoo import bundled_path
from tests.families import make
from tests.runtime.packing import pack

TOGETHER = ["llama", "qwen2", "gemma2", "gemma3", "gpt_oss", "mixtral", "gpt2"]
ALONE = ["bloom", "jamba"]
"""Families whose rows go through the model one by one."""
PLENTY = 1 << 30


class Words:
    """Stands for a tokenizer: every token is its number and a space."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(f"{token} " for token in ids)


class Gathered:
    """What is delivered of one request."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.ended = threading.Event()

    def __call__(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.finish:
            self.ended.set()

    def text(self) -> str:
        assert self.ended.wait(60)
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        assert self.ended.wait(60)
        return self.pieces[-1].finish


def engine_of(model: Any, tokenizer: Any = None, **more: Any) -> Engine:
    settings = {"slots": 4, "queue": 100, "ends": frozenset(), "metrics": Metrics(), "memory": PLENTY, **more}
    return Engine(model, tokenizer or Words(), **settings)


def prompts(count: int, seed: int = 0, longest: int = 20) -> list[tuple[tuple[int, ...], int]]:
    """(prompt, tokens to make) of mixed lengths."""
    numbers = random.Random(seed)
    return [
        (tuple(numbers.randrange(3, 300) for _ in range(numbers.randint(1, longest))), numbers.randint(1, 12))
        for _ in range(count)
    ]


def alone(model: Any, prompt: tuple[int, ...], most: int) -> str:
    """What transformers' own generate makes."""
    how = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "pad_token_id": 0}
    out = type(model).generate(model, torch.tensor([prompt]), **how)
    return Words().decode(out[0, len(prompt) :].tolist())


def run(engine: Engine, asked: list[tuple[tuple[int, ...], int]], **more: Any) -> list[Gathered]:
    got = [Gathered() for _ in asked]
    for (prompt, most), one in zip(asked, got):  # one by one, so that they join at any step
        engine.submit([(Request(prompt, most, **more), one)])
    return got


@pytest.mark.parametrize("name", [*TOGETHER, *ALONE])
def test_each_answer_is_that_of_the_request_alone(name: str) -> None:
    """Float32, greedy, mixed lengths, more requests than slots; over windows, hybrids and families that cannot be
    batched."""
    model = make(name)
    model.generation_config.eos_token_id = None
    asked = prompts(7)
    expected = [alone(model, *one) for one in asked]
    engine = engine_of(model)
    assert bool(engine.batcher.why_single) == (name in ALONE), engine.batcher.why_single
    engine.start()
    got = [one.text() for one in run(engine, asked)]
    engine.stop()
    assert got == expected


def test_long_prompts_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen2")
    asked = prompts(6, longest=60)
    monkeypatch.setattr("slimwright.serving.batch.CHUNK", 16)
    engine = engine_of(model)
    assert max(len(prompt) for prompt, _ in asked) > 48
    engine.start()
    got = [one.text() for one in run(engine, asked)]
    engine.stop()
    assert got == [alone(model, *one) for one in asked]


def test_a_packed_cache_gives_what_it_gives_alone() -> None:
    """Each row's keys are packed at its own places: the texts are those of ``generate`` with the same formats."""
    model = make("qwen2")
    formats = {i: KvFormat(2, 32, 32) for i in attention_layers(model.config)}
    model.generate = Generation(model, formats)
    asked = [(prompt * 4, 40) for prompt, _ in prompts(4)]
    how = {"do_sample": False, "pad_token_id": 0}
    expected = [
        Words().decode(
            model.generate(torch.tensor([p]), max_new_tokens=n, min_new_tokens=n, **how)[0, len(p) :].tolist()
        )
        for p, n in asked
    ]
    engine = engine_of(model)
    engine.start()
    got = [one.text() for one in run(engine, asked)]
    engine.stop()
    assert got == expected


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(bundled_path())


@pytest.fixture
def engine(bundled: tuple[Any, Any]) -> Iterator[Engine]:
    made = engine_of(*bundled, slots=3, ends=frozenset({0}))
    made.start()
    yield made
    made.stop(0)


def test_a_packed_model_of_ours(tmp_path: Path) -> None:
    model = slimwright.load(pack(bundled_path(), tmp_path, ("int4:g32",)).directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    texts = ["def main():", "import os\nfor name in os.listdir", "class Queue:\n    def put", "The"]
    asked = [(tuple(tokenizer(text).input_ids), 12) for text in texts]
    how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = [model.generate(torch.tensor([p]), **how)[0].tolist() for p, _ in asked]
    made = engine_of(model, tokenizer)
    made.start()
    got = [text + one.text() for text, one in zip(texts, run(made, asked))]
    made.stop()
    assert got == [tokenizer.decode(ids) for ids in expected]
    if packed.library() is not None:
        assert made.batcher.whole is not None  # all that a turn brought was one call of the kernels


def ids(bundled: tuple[Any, Any], text: str) -> tuple[int, ...]:
    return tuple(bundled[1](text).input_ids)


def test_streams_stops_and_scores(engine: Engine, bundled: tuple[Any, Any]) -> None:
    """Pieces are the whole text; a stop string ends it and is not in it; scores are the model's log probabilities."""
    prompt = ids(bundled, "import os\nfor name in os.")
    whole, streamed, stopped, scored = (Gathered() for _ in range(4))
    engine.submit([(Request(prompt, 16), whole), (Request(prompt, 16, stream=True), streamed)])
    assert streamed.text() == whole.text() and len(whole.pieces) == 1 < len(streamed.pieces)
    assert sum(piece.tokens for piece in streamed.pieces) == 16 and whole.finish == "length"
    stop = whole.text()[5:9]
    engine.submit([(Request(prompt, 16, stop=(stop,), stream=True), stopped), (Request(prompt, 5, logprobs=3), scored)])
    assert stopped.text() == whole.text().partition(stop)[0] and stopped.finish == "stop"
    assert scored.finish == "length"
    scores = scored.pieces[0].scores
    tokens = [*prompt, *(score.token for score in scores)]
    with torch.no_grad():
        logs = bundled[0](input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
    for place, score in enumerate(scores, len(prompt) - 1):
        assert score.logprob == pytest.approx(float(logs[place, score.token]), abs=1e-4)
        assert [token for token, _ in score.likeliest] == logs[place].topk(3).indices.tolist()


def test_an_end_token_ends(bundled: tuple[Any, Any]) -> None:
    """It counts as a token and gives no text."""
    model, tokenizer = bundled
    prompt = ids(bundled, "import os\nfor name in os.")
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    made = model.generate(torch.tensor([prompt]), **how)[0, len(prompt) :].tolist()
    engine = engine_of(model, tokenizer, ends=frozenset({made[3]}))
    engine.start()
    (got,) = run(engine, [(prompt, 6)])
    assert got.text() == tokenizer.decode(made[:3]) and got.finish == "stop" and got.pieces[0].tokens == 4
    engine.stop()


def test_sampling_has_its_own_random_numbers(engine: Engine, bundled: tuple[Any, Any]) -> None:
    """The same seed gives the same text beside others; other seeds others; a tiny ``top_p`` is greedy."""
    prompt = ids(bundled, "def ")
    hot = Sampling(1.0, seed=5)
    (first,) = run(engine, [(prompt, 12)], sampling=hot)
    first.text()
    beside = run(engine, [(prompt, 12)] * 3, sampling=Sampling(1.0, seed=6))
    (again,) = run(engine, [(prompt, 12)], sampling=hot)
    (greedy,) = run(engine, [(prompt, 12)])
    (narrow,) = run(engine, [(prompt, 12)], sampling=Sampling(1.0, top_p=1e-6, seed=1))
    assert again.text() == first.text() != beside[0].text() == beside[1].text()
    assert narrow.text() == greedy.text()


def test_cancelled_and_late_ones_leave(engine: Engine, bundled: tuple[Any, Any]) -> None:
    """Others go on, and nothing of theirs changes."""
    prompt = ids(bundled, "import os\nfor name in os.")
    (reference,) = run(engine, [(prompt, 20)])
    reference.text()
    gone, late, stays, waits = (Gathered() for _ in range(4))
    (ticket,) = engine.submit([(Request(prompt, 900, stream=True), gone)])
    engine.submit(
        [(Request(prompt, 900, seconds=0.0), late), (Request(prompt, 20), stays), (Request(prompt, 9), waits)]
    )
    while not gone.pieces:
        time.sleep(0)
    ticket.cancel()
    assert gone.finish == "cancelled" and late.finish == "timeout"
    assert stays.text() == reference.text() and waits.finish == "length"


def test_a_full_queue_refuses_all_or_none(bundled: tuple[Any, Any]) -> None:
    engine = engine_of(*bundled, slots=1, queue=2)  # not started: nothing leaves the queue
    request = Request(ids(bundled, "def "), 4)
    engine.submit([(request, Gathered())] * 3)
    with pytest.raises(BusyError, match="wait already"):
        engine.submit([(request, Gathered())])
    smaller = engine_of(*bundled, slots=1, queue=2)
    with pytest.raises(InputError, match="4 texts are asked for in one request, but this server takes 3"):
        smaller.submit([(request, Gathered())] * 4)
    got = [Gathered() for _ in range(3)]
    smaller.submit([(request, one) for one in got[:2]])
    with pytest.raises(BusyError):
        smaller.submit([(request, Gathered())] * 2)
    smaller.submit([(request, got[2])])
    smaller.start()
    assert {one.finish for one in got} == {"length"}
    smaller.stop()


def test_memory_bounds_what_runs_together(bundled: tuple[Any, Any]) -> None:
    """Texts wait until there is room for all that those before them may become."""
    token = Batcher(bundled[0]).token_bytes
    layers, heads, dim = 5, 2, 64
    assert token == 2 * layers * heads * dim * 4
    engine = engine_of(*bundled, slots=4, memory=token * 50)
    seen = []
    forward = engine.batcher.run
    engine.batcher.run = lambda parts: (seen.append(len(parts)), forward(parts))[1]  # type: ignore[method-assign]
    got = [Gathered() for _ in range(6)]
    engine.submit([(Request((5,) * 5, 20), one) for one in got])
    engine.start()
    assert {one.finish for one in got} == {"length"} and max(seen) == 2
    engine.stop()


def test_stop_finishes_what_was_taken_and_takes_no_more(bundled: tuple[Any, Any]) -> None:
    engine = engine_of(*bundled, slots=2)
    got = [Gathered() for _ in range(5)]
    engine.submit([(Request((5, 6), 8), one) for one in got])
    engine.start()
    engine.stop()
    assert all(one.finish == "length" for one in got)
    with pytest.raises(BusyError, match="stopping"):
        engine.submit([(Request((5,), 1), Gathered())])


def test_a_failed_forward_ends_its_texts_only(bundled: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of(*bundled)
    forward = engine.batcher.run

    def failing(parts: Any) -> Any:
        if any(len(part.tokens) == 3 for part in parts):
            raise MemoryError
        return forward(parts)

    engine.batcher.run = failing  # type: ignore[method-assign]
    bad, good = run(engine, [((5, 6, 7), 4), ((5, 6), 4)])
    engine.start()
    assert bad.finish == "error" and "not enough memory" in bad.pieces[-1].error and good.finish == "length"
    engine.stop()


def test_a_defect_of_the_engine_ends_all_texts(bundled: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for an engine that does not run any more, and nobody is let in."""
    engine = engine_of(*bundled, slots=1)

    def failing() -> None:
        raise KeyError("a defect")

    engine._join = failing  # type: ignore[method-assign]
    got = run(engine, [((5, 6), 4)] * 3)
    engine.start()
    assert {one.finish for one in got} == {"error"} and "KeyError" in got[2].pieces[-1].error
    engine.stop()
    assert not engine.alive
    with pytest.raises(BusyError, match="stopping"):
        engine.submit([(Request((5,), 1), Gathered())])


def test_rows_whose_positions_depend_on_the_longest_text_go_one_by_one() -> None:
    model = make("llama")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    assert "longest text" in Batcher(model).why_single


def test_nothing_stays_of_what_has_ended(engine: Engine, bundled: tuple[Any, Any]) -> None:
    for one in run(engine, [((5, 6, 7), 3)] * 20):
        one.text()
    assert not engine._running and not engine._waiting and not engine._calls
