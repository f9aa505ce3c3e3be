"""Adapters at run time: the sums are PEFT's, rows of one batch have their own, and what does not belong is refused."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimwright.checkpoint import Checkpoint, Lineage, fingerprint
from slimwright.cli import main
from slimwright.errors import InputError, NotBuiltError
from slimwright.formats.peft import BASE_FINGERPRINT, base_fingerprint
from slimwright.serving.adapters import Applied, open_adapter
from slimwright.serving.requests import Request
from slimwright.serving.served import Served, load_served
from slimwright.zoo import bundled_path
from tests.families import make
from tests.serving.serving import ask, get, post, refusal
from tests.serving.test_engine import Gathered, engine_of

PROMPT = "import os\nfor name in os."
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(bundled_path(), dtype=torch.float32)


def write(directory: Path, seed: int = 0, told: str | None = None, model: Any = None, **settings: Any) -> Path:
    """An adapter as PEFT writes it, that changes a lot; ``told``: a fingerprint for its file."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "init_lora_weights": False, **settings})
    adapted = get_peft_model(model or base(), config)
    adapted.peft_config["default"].base_model_name_or_path = "someone/else"
    adapted.save_pretrained(directory)
    if told is not None:
        file = directory / "adapter_model.safetensors"
        save_file(load_file(file), file, {"format": "pt", BASE_FINGERPRINT: told})
    return directory


def own() -> str:
    return fingerprint(Checkpoint.open(bundled_path()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("adapters")
    write(found / "one", 1, own())
    write(found / "two", 2, r=8, use_rslora=True, rank_pattern={"layers.1.*q_proj": 2})
    return found


@pytest.fixture(scope="module")
def loaded() -> Iterator[Served]:
    made = load_served(str(bundled_path()), dtype="float32", slots=4)
    yield made
    made.stop(0)


@pytest.fixture
def served(loaded: Served) -> Iterator[Served]:
    yield loaded
    loaded.adapters.clear()


def alone(adapter: Path | None) -> str:
    """What PEFT's model makes of the prompt."""
    model, tokenizer = base(), AutoTokenizer.from_pretrained(bundled_path())
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(out)[len(tokenizer.decode(ids[0])) :]


def body(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}


def text(answer: Any) -> str:
    return answer.json()["choices"][0]["text"]


def test_each_request_has_its_adapter(served: Served, folder: Path) -> None:
    """Base and two adapters in one batch, as often as not: each answer is PEFT's."""
    expected = {served.name: alone(None), "one": alone(folder / "one"), "two": alone(folder / "two")}
    assert len(set(expected.values())) == 3

    async def go(client: Any) -> None:
        for name in ("one", "two"):
            loaded = await client.post("/v1/adapters", json={"name": name, "path": str(folder / name)})
            assert loaded.status_code == 200 and loaded.json()["layers"] == 15
            assert loaded.json()["checked_by"] == ("fingerprint" if name == "one" else "shapes")
            assert loaded.json()["base_model"] == "someone/else"
        listed = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == [served.name, "one", "two"]
        names = [served.name, "one", "two", "one"] * 2
        steps = served.metrics.steps.values[""]
        answers = await asyncio.gather(*(client.post("/v1/completions", json=body(name)) for name in names))
        assert served.metrics.steps.values[""] - steps < len(names) * 6  # they shared forwards
        assert [text(answer) for answer in answers] == [expected[name] for name in names]
        assert (await client.delete("/v1/adapters/one")).json()["deleted"]
        assert (await client.post("/v1/completions", json=body("one"))).status_code == 404
        assert text(await client.post("/v1/completions", json=body("two"))) == expected["two"]

    ask(served, go)


def test_unloaded_while_it_runs(served: Served, folder: Path) -> None:
    """A text that began with an adapter ends with it."""

    async def go(client: Any) -> None:
        await client.post("/v1/adapters", json={"name": "one", "path": str(folder / "one")})
        expected = text(await client.post("/v1/completions", json=body("one", max_tokens=60)))
        assert served.engine is not None
        running = asyncio.create_task(client.post("/v1/completions", json=body("one", max_tokens=60)))
        while not served.engine._running:
            await asyncio.sleep(0.001)
        await client.delete("/v1/adapters/one")
        assert text(await running) == expected

    ask(served, go)


def test_an_adapter_of_a_rounded_descendant(folder: Path) -> None:
    """The base's adapter fits a result of fit; a merged model's ancestor's does not; nor does a stranger's."""
    told = Lineage("packed", (Lineage(own()),), ({"edit": "quantize"},))
    assert open_adapter("a", folder / "one", base(), told).checked == "fingerprint"
    merged = Lineage("merged", (Lineage(own()),), ({"edit": "merge"},))
    with pytest.raises(InputError, match=r"ancestor, whose weights were changed since \(merge\)"):
        open_adapter("a", folder / "one", base(), merged)
    with pytest.raises(InputError, match="another base"):
        open_adapter("a", folder / "one", base(), Lineage("other"))


def test_the_base_that_peft_names_is_compared_where_it_is_here(folder: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(folder / "two", tmp_path / "named")
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(bundled_path())
    (directory / "adapter_config.json").write_text(json.dumps(config))
    found = open_adapter("a", directory, base(), Lineage(own()))
    assert found.checked == "fingerprint of its base's directory"
    with pytest.raises(InputError, match="another base"):
        open_adapter("a", directory, base(), Lineage("other"))


def damaged(folder: Path, tmp_path: Path, how: str) -> Path:
    directory = shutil.copytree(folder / "one", tmp_path / how)
    file, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "noise":
        file.write_bytes(b"\xff" * 100)
    elif how == "nan":
        tensors[first][0, 0] = float("nan")
        save_file(tensors, file)
    elif how == "half":
        del tensors[first]
        save_file(tensors, file)
    elif how == "gone":
        file.unlink()
    elif how == "json":
        config.write_text("{")
    elif how == "wide":
        save_file({n: t.repeat(1, 2) if "lora_A" in n else t for n, t in tensors.items()}, file)
    elif how == "stranger":
        save_file({n.replace("q_proj", "other_proj"): t for n, t in tensors.items()}, file)
    return directory


@pytest.mark.parametrize("how", ["cut", "noise", "nan", "half", "gone", "json", "wide", "stranger"])
def test_damaged_adapters_are_refused(served: Served, folder: Path, tmp_path: Path, how: str) -> None:
    """In one sentence; what is served goes on."""
    loaded = post(served, "/v1/adapters", {"name": "bad", "path": str(damaged(folder, tmp_path, how))})
    assert how in refusal(loaded, 400)  # the directory is named
    assert not served.adapters


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "cut"), ("wide", "of another base"), ("other", "of another base: that has the fingerprint")],
)
def test_a_server_does_not_start_with_such_an_adapter(
    folder: Path, tmp_path: Path, how: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and exit code 2; nothing was served."""
    directory = write(tmp_path / how, told="0" * 64) if how == "other" else damaged(folder, tmp_path, how)
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(bundled_path()), "--port", "0", "--adapter", f"a={directory}"])
    said = capsys.readouterr()
    assert ended.value.code == 2 and "Serving" not in said.out
    sentence = said.err.strip().splitlines()[-1]
    assert words in sentence and sentence.endswith(".")


def test_names_and_kinds(served: Served, folder: Path, tmp_path: Path) -> None:
    one = str(folder / "one")
    assert post(served, "/v1/adapters", {"name": "one", "path": one}).status_code == 200
    for name in ("one", served.name):
        assert "already" in refusal(post(served, "/v1/adapters", {"name": name, "path": one}), 400)
    refusal(post(served, "/v1/adapters", {"name": "a/b", "path": one}), 400)
    refusal(post(served, "/v1/adapters", {"name": "none", "path": str(tmp_path / "none")}), 400)
    refusal(post(served, "/v1/adapters", {"name": "none", "path": "\0"}), 400)
    assert "no adapter" in refusal(ask(served, lambda made: made.delete("/v1/adapters/none")), 404)
    refusal(post(served, "/v1/adapters", {"name": "x", "path": one}, key="k"), 401)
    assert get(served, "/v1/adapters").json()["data"][0]["id"] == "one"
    for number, settings in enumerate(
        ({"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["norm"]})
    ):
        with pytest.raises(NotBuiltError, match="not served"):
            open_adapter("a", write(tmp_path / f"kind{number}", **settings), base(), Lineage("x"))  # type: ignore[arg-type]


def test_a_layer_that_never_runs_by_itself_is_noticed(
    served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that would change nothing is refused, not taken in silence."""
    assert served.engine is not None
    attention = served.engine.batcher.model.get_submodule("model.layers.0.self_attn")
    projection = attention.q_proj
    forward = attention.forward

    def fused(*arguments: Any, **more: Any) -> Any:
        """Past the layer's own call, as a kernel for all three projections would."""
        call = projection.__class__.__call__
        projection.__class__.__call__ = lambda self, x: self.forward(x)
        try:
            return forward(*arguments, **more)
        finally:
            projection.__class__.__call__ = call

    monkeypatch.setattr(attention, "forward", fused)
    with pytest.raises(NotBuiltError, match="inside another layer"):
        served.add_adapter("one", str(folder / "one"))


def test_transposed_layers(tmp_path: Path) -> None:
    """GPT-2 keeps (in, out)."""
    how = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    directory = write(tmp_path / "gpt2", model=make("gpt2"), **how)
    model = make("gpt2")
    applied = Applied(model)
    adapter = open_adapter("a", directory, model, Lineage("x"))
    applied.check(adapter)
    ids = torch.randint(3, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with applied.rows([None, adapter]):
            got = model(input_ids=ids).logits
        expected = PeftModel.from_pretrained(make("gpt2"), str(directory))(input_ids=ids).logits
    assert torch.equal(got[0], plain[0]) and not torch.allclose(plain[1], expected[1], atol=1e-2)
    assert torch.allclose(got[1], expected[1], atol=1e-5)


def test_rows_that_go_one_by_one_have_their_own_too(tmp_path: Path) -> None:
    """Bloom cannot be batched: each row has its adapter nevertheless."""
    directory = write(tmp_path / "bloom", model=make("bloom"), target_modules=["query_key_value"])
    model = make("bloom")
    engine = engine_of(model)
    assert engine.batcher.why_single
    adapter = open_adapter("a", directory, model, Lineage("x"))
    engine.batcher.applied.check(adapter)
    adapted = PeftModel.from_pretrained(make("bloom"), str(directory))
    prompt = (5, 6, 7, 8)
    got = [Gathered() for _ in range(3)]
    requests = [Request(prompt, 3, logprobs=0, adapter=one) for one in (None, adapter, None)]
    engine.submit(list(zip(requests, got)))
    engine.start()
    assert all(one.finish == "length" for one in got)
    engine.stop()
    made = [one.pieces[0].scores for one in got]
    for scores, reference in zip(made, (make("bloom"), adapted, make("bloom"))):
        ids = torch.tensor([[*prompt, *(score.token for score in scores)]])
        with torch.no_grad():
            logs = reference(input_ids=ids).logits[0].log_softmax(-1)
        expected = [float(logs[3 + place, score.token]) for place, score in enumerate(scores)]
        assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-4)
    assert abs(made[0][1].logprob - made[1][1].logprob) > 1e-2


def test_the_fingerprint_survives_peft(folder: Path) -> None:
    assert base_fingerprint(folder / "one") == own() and base_fingerprint(folder / "two") is None
    with safe_open(folder / "one" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
