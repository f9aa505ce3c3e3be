"""``merge`` from configuration to result, on small checkpoints whose merge is computed here by other code."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import slimwright
from slimwright.checkpoint import faults
from slimwright.errors import InputError, SlimwrightError
from slimwright.job import merge as job
from slimwright.job import parallel
from slimwright.job.merging import engine, extract, proof
from slimwright.methods import method
from slimwright.methods.merge.lora_extract import LoraExtract
from tests.checkpoint.samples import save_checkpoint
from tests.families import cached
from tests.job.conftest import files, fitted, in_forked_child, tiny

CONFIG = {"model_type": "test", "num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "dtype": "float32"}


def tensors(seed: int, layers: int = 4, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A small decoder's tensors; near those of another where one is given."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,), "lm_head.weight": (50, 16)}
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.self_attn.q_proj.weight": (16, 16),
            f"model.layers.{layer}.mlp.experts.0.up_proj.weight": (24, 16),
            f"model.layers.{layer}.mlp.experts.1.up_proj.weight": (24, 16),
            f"model.layers.{layer}.input_layernorm.weight": (16,),
        }
    random = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return random if like is None else {name: like[name] + 0.1 * value for name, value in random.items()}


BASE = tensors(0)
FIRST, SECOND = tensors(1, like=BASE), tensors(2, like=BASE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Directories of a base and two models; never write to them."""
    root = tmp_path_factory.mktemp("models")
    for name, content, shards in (("base", BASE, 1), ("first", FIRST, 3), ("second", SECOND, 2)):
        save_checkpoint(root / name, content, shards, CONFIG)
    (root / "base" / "tokenizer.json").write_text("{}")
    return {name: str(root / name) for name in ("base", "first", "second")}


def merged(config: Mapping[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    """Run a merge; the tensors of the result."""
    slimwright.merge(config, out, quiet=True, **options)
    found: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def both(models: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"models": [models["first"], models["second"]], **more}


def test_a_mergekit_file_means_what_mergekit_does(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "merge_method": "linear", "dtype": "float32", "lazy_unpickle": True,
                "models": [
                    {"model": models["first"], "parameters": {"weight": [0.0, 1.0]}},
                    {
                        "model": models["second"],
                        "parameters": {"weight": [{"filter": "q_proj", "value": 3}, {"value": 1}]},
                    },
                ],
            }
        )
    )  # fmt: skip
    report = slimwright.merge(str(file), tmp_path / "out", quiet=True)
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result.keys() == BASE.keys()
    for name, found in result.items():
        layer = int(name.split(".")[2]) if "layers" in name else 0  # outside the layers a gradient is at its beginning
        first, second = layer / 3, 3.0 if "q_proj" in name else 1.0
        expected = (first * FIRST[name] + second * SECOND[name]) / (first + second)
        assert torch.allclose(found, expected, atol=1e-6), name
    assert report["definitions"] == "mergekit" and report["verified"]["ok"]
    assert any("lazy_unpickle" in note for note in report["notes"])
    ledger = {line["tensor"]: line for line in report["ledger"]}
    assert set(ledger) == set(BASE) and sum(line["bytes"] for line in ledger.values()) == sum(
        tensor.nbytes for tensor in BASE.values()
    )
    assert len(report["lineage"]["parents"]) == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "linear" in card and models["first"] in card
    expected_files = {"report.json", "report.html", "merge.yaml", "config.json", "README.md"}
    assert expected_files <= set(os.listdir(tmp_path / "out"))


def test_our_form_has_the_papers_definitions(models: dict[str, str], tmp_path: Path) -> None:
    ours = merged({"method": "ties", "base": models["base"], **both(models)}, tmp_path / "out")
    ties = method("merge/ties")
    state = ties.prepare([FIRST, SECOND], base=BASE)
    for name, found in ours.items():
        assert torch.equal(found, ties.merge([FIRST[name], SECOND[name]], BASE[name], site=name, state=state)), name
    parameters = {"weight": 1.0, "density": 0.2}
    config = {"merge_method": "ties", "base_model": models["base"], "parameters": parameters, **both(models)}
    theirs = merged(config, tmp_path / "theirs")
    by_tensor = method("merge/ties", granularity="tensor", majority="plus", density=0.2)
    for name, found in theirs.items():
        assert torch.equal(found, by_tensor.merge([FIRST[name], SECOND[name]], BASE[name])), name
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["dare", "della", "slerp", "karcher", "breadcrumbs", "sce", "model_stock"])
def test_the_engine_gives_what_the_method_gives(models: dict[str, str], tmp_path: Path, name: str) -> None:
    merger = method(f"merge/{name}")
    uses_base = merger.base_model == "required" or name == "slerp"
    config = {"method": name, **both(models, seed=5)}
    given = [FIRST, SECOND]
    if uses_base:
        config["base"] = models["base"]
    if name == "slerp":
        config["models"], given = [models["second"]], [SECOND]
    found = merged(config, tmp_path / "out")
    for tensor, value in found.items():
        expected = merger.merge(
            [model[tensor] for model in given], BASE[tensor] if uses_base else None, site=tensor, seed=5
        )
        assert torch.equal(value, expected), tensor


def test_bytes_do_not_depend_on_threads_or_tiles(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of one block against many blocks, one thread against two, for methods without whole-tensor sums."""
    big = {
        name: torch.randn(3 * engine.BLOCK + 5, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate("ab")
    }
    for which in range(3):
        noise = torch.Generator().manual_seed(which)
        save_checkpoint(
            tmp_path / f"m{which}", {n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in big.items()}
        )
    threads = torch.get_num_threads()
    for name in ("ties", "dare"):
        config = {"method": name, "base": str(tmp_path / "m0"), "models": [str(tmp_path / "m1"), str(tmp_path / "m2")]}
        results = []
        try:
            for count, tile in ((1, engine.BLOCK), (2, 2 * engine.BLOCK), (2, engine.BLOCK)):
                torch.set_num_threads(count)
                monkeypatch.setattr(engine, "TILE_ELEMENTS", tile)
                merged(config, tmp_path / f"{name}{count}{tile}")
                results.append(files(tmp_path / f"{name}{count}{tile}"))
        finally:
            torch.set_num_threads(threads)
        assert results[0] == results[1] == results[2]


# -- slices ----------------------------------------------------------------------------------------------------------


def test_slices_stack_layers(models: dict[str, str], tmp_path: Path) -> None:
    half = {"scale": [{"filter": "q_proj", "value": 0.5}]}
    config = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": models["base"], "layer_range": [0, 3]}]},
            {"sources": [{"model": models["first"], "layer_range": [1, 4], "parameters": half}]},
        ],
    }
    found = merged(config, tmp_path / "out")
    sources = [(BASE, 0), (BASE, 1), (BASE, 2), (FIRST, 1), (FIRST, 2), (FIRST, 3)]
    for layer, (model, own) in enumerate(sources):
        for name in [name for name in BASE if name.startswith(f"model.layers.{own}.")]:
            factor = 0.5 if model is FIRST and "q_proj" in name else 1.0
            new = name.replace(f"layers.{own}.", f"layers.{layer}.")
            assert torch.equal(found[new], factor * model[name]), new
    assert torch.equal(found["model.embed_tokens.weight"], BASE["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], FIRST["lm_head.weight"])  # behind the layers: of the last slice
    assert len(found) == len(BASE) + 2 * 4
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 6 and written["layer_types"] == ["a", "b", "c", "b", "c", "d"]


def test_slices_merge_layers_of_different_places(models: dict[str, str], tmp_path: Path) -> None:
    sources = [{"model": models["first"], "layer_range": [0, 2]}, {"model": models["second"], "layer_range": [2, 4]}]
    found = merged({"method": "linear", "slices": [{"sources": sources}]}, tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(found[name], (FIRST[name] + SECOND[name.replace(".1.", ".3.", 1)]) / 2, atol=1e-6)


def test_a_repeated_layer_with_its_outputs_at_zero_changes_nothing(tmp_path: Path) -> None:
    """A real model: the deeper one has the same logits, and generates the same with a cache."""
    source = str(cached("llama", torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(source).eval()
    count = plain.config.num_hidden_layers
    zero = {"scale": [{"filter": "o_proj", "value": 0}, {"filter": "down_proj", "value": 0}, {"value": 1}]}
    config = {
        "method": "passthrough",
        "slices": [
            {"sources": [{"model": source, "layer_range": [0, count]}]},
            {"sources": [{"model": source, "layer_range": [count - 1, count], "parameters": zero}]},
        ],
    }
    slimwright.merge(config, tmp_path / "out", quiet=True)
    deeper = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert deeper.config.num_hidden_layers == count + 1
    tokens = torch.arange(3, 19).reshape(1, -1)
    with torch.no_grad():
        assert torch.allclose(deeper(tokens).logits, plain(tokens).logits, atol=1e-5)
        both_ways = [
            model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=cache)
            for model in (plain, deeper) for cache in (True, False)
        ]  # fmt: skip
    assert all(torch.equal(way, both_ways[0]) for way in both_ways)


# -- inputs ----------------------------------------------------------------------------------------------------------


def test_tied_heads_are_written_once_and_the_result_loads(tmp_path: Path) -> None:
    """One fine-tune stores its tied head, the other does not."""
    source = cached("qwen2", torch.bfloat16)
    content = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    assert config["tie_word_embeddings"] and "lm_head.weight" not in content
    other = {name: (tensor.float() * 1.1).bfloat16() for name, tensor in content.items()}
    other["lm_head.weight"] = other["model.embed_tokens.weight"].clone()
    save_checkpoint(tmp_path / "other", other, config=config)
    report = slimwright.merge(
        {"method": "linear", "models": [str(source), str(tmp_path / "other")]}, tmp_path / "out", quiet=True
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == content.keys()
    assert {"state": "not read"}.items() <= next(
        line for line in report["ledger"] if "lm_head" in line["tensor"]
    ).items()
    for name, tensor in found.items():
        expected = ((content[name].float() + other[name].float()) / 2).bfloat16()
        assert torch.equal(tensor, expected), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(8).reshape(1, -1)).logits).all()


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "embedding"])
def test_adapters_are_inputs(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    source = cached("llama", torch.float32)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(source)
    targets = ["q_proj", "down_proj"] + (["embed_tokens"] if kind == "embedding" else [])
    settings = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=targets, use_rslora=kind == "rslora", use_dora=kind == "dora",
        rank_pattern={"down_proj": 2}, modules_to_save=["norm"] if kind == "plain" else None,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted.merge_and_unload().state_dict()
    found = merged({"method": "passthrough", "models": [f"{source}+{tmp_path / 'adapter'}"]}, tmp_path / "out")
    for name, tensor in found.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name
    changed = [
        name for name, tensor in found.items() if not torch.equal(tensor, load_file(source / "model.safetensors")[name])
    ]
    assert any("down_proj" in name for name in changed) and not any("up_proj" in name for name in changed)


def test_our_compressed_results_are_inputs(tmp_path: Path) -> None:
    small = tmp_path / "small"
    fitted(tiny("qwen2"), small, grid="int8:g32")
    slimwright.export(str(small), out=str(tmp_path / "dense"))
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    plain = load_file(Path(tiny("qwen2")) / "model.safetensors")
    found = merged({"method": "linear", "models": [str(small), tiny("qwen2")]}, tmp_path / "out")
    assert found.keys() == plain.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, ((dense[name].float() + plain[name].float()) / 2).to(tensor.dtype)), name


def test_integers_are_copied_and_the_dtype_is_cast_once(tmp_path: Path) -> None:
    for which in range(2):
        save_checkpoint(
            tmp_path / f"m{which}",
            {"w": torch.full((3, 5), 1 / 3 + which), "ids": torch.arange(7) + which, "none": torch.empty(0, 4)},
        )
    config = {"method": "linear", "models": [str(tmp_path / "m0"), str(tmp_path / "m1")], "dtype": "bfloat16"}
    found = merged(config, tmp_path / "out")
    assert torch.equal(found["w"], torch.full((3, 5), 1 / 3 + 0.5).bfloat16())
    assert torch.equal(found["ids"], torch.arange(7)) and found["none"].shape == (0, 4)


# -- notes -----------------------------------------------------------------------------------------------------------


def test_a_result_equal_to_an_input_is_warned_of(models: dict[str, str], tmp_path: Path) -> None:
    config = {"merge_method": "slerp", "base_model": models["first"], "models": [{"model": models["second"]}]}
    report = slimwright.merge({**config, "parameters": {"t": 0}}, tmp_path / "out", quiet=True)
    assert any("equals" in note and models["first"] in note for note in report["notes"])
    other = slimwright.merge({**config, "parameters": {"t": 0.5}}, tmp_path / "other", quiet=True)
    assert not any("equals" in note for note in other["notes"])


def test_licences_are_carried_and_conflicts_told(models: dict[str, str], tmp_path: Path) -> None:
    for name, licence in (("a", "mit"), ("b", "cc-by-nc-4.0")):
        save_checkpoint(tmp_path / name, FIRST, config=CONFIG)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\n---\n# x\n")
    report = slimwright.merge(
        {"method": "linear", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}, tmp_path / "out", quiet=True
    )
    assert any("different licences" in note and "cc-by-nc-4.0" in note for note in report["notes"])
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---")[1])
    assert front["license"] == "other" and "merge" in front["tags"]
    same = slimwright.merge(
        {"method": "linear", "models": [str(tmp_path / "a"), models["first"]]}, tmp_path / "same", quiet=True
    )
    assert any("No licence was found" in note for note in same["notes"])


def test_a_dry_run_writes_nothing(models: dict[str, str], tmp_path: Path) -> None:
    report = slimwright.merge(
        {"method": "ties", "base": models["base"], **both(models)}, tmp_path / "out", dry_run=True
    )
    assert report.out is None and not any(tmp_path.iterdir())
    assert report["size"]["after"] > 0 and report["forecast"]["seconds"] > 0 and report["forecast"]["memory_bytes"] > 0


# -- proof, crashes --------------------------------------------------------------------------------------------------


def test_a_damaged_result_is_not_published(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte wrong in the first rows of one tensor, after it was written."""
    real = proof.prove

    def damaged(plan: Any, written: Path, *rest: Any) -> Any:
        file = written / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        return real(plan, written, *rest)

    monkeypatch.setattr(job, "prove", damaged)
    with pytest.raises(SlimwrightError, match="not written as it should be"):
        merged({"method": "linear", **both(models)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def in_child(config: Mapping[str, Any], out: Path, **environment: str) -> int:
    """The exit status of a merge in a forked child (137: killed by the injected crash)."""
    return in_forked_child(lambda: slimwright.merge(config, out, quiet=True, max_shard_bytes=20_000), **environment)


@pytest.mark.parametrize("name", ["dare", "ties", "tall"])
def test_a_killed_merge_continues_to_the_same_bytes(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(engine, "COMMIT_BYTES", 4_000)
    monkeypatch.setattr(parallel, "_pool", None)  # threads do not survive a fork
    config = {"method": name, "base": models["base"], **both(models)}
    assert in_child(config, tmp_path / "whole", SLIMWRIGHT_COUNT_POINTS=str(tmp_path / "points")) == 0
    points = Counter((tmp_path / "points").read_text().split())
    assert set(points) == set(faults.POINTS)
    whole = files(tmp_path / "whole")
    tried = dict.fromkeys(f"{point}:{1 + count * part // 2}" for point, count in points.items() for part in range(2))
    crashed = 0
    for where in tried:
        out = tmp_path / where.replace(":", "-")
        status = in_child(config, out, SLIMWRIGHT_CRASH_AT=where)
        # How often files are synced depends on the timing, so a run may not reach the last of these points.
        assert status in (0, faults.CRASH_STATUS), where
        crashed += status != 0
        assert in_child(config, out) == 0, where
        assert files(out) == whole, where
        assert not out.with_name(out.name + ".partial").exists()
    assert crashed >= len(tried) - 3
    assert in_child(config, tmp_path / "whole") == 0  # finished: nothing to do
    changed = {**config, "seed": 1}
    with pytest.raises(InputError, match="not empty"):
        slimwright.merge(changed, tmp_path / "whole", quiet=True)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_bad_inputs_are_refused_in_one_sentence(models: dict[str, str], tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "short", {**FIRST, "model.norm.weight": torch.ones(8)}, config=CONFIG)
    save_checkpoint(tmp_path / "less", {k: v for k, v in FIRST.items() if "norm" not in k}, config=CONFIG)
    poisoned = {**FIRST, "model.norm.weight": torch.tensor([float("nan")] * 16)}
    save_checkpoint(tmp_path / "nan", poisoned, config=CONFIG)
    a, base = models["first"], models["base"]
    one = {"sources": [{"model": a, "layer_range": [0, 9]}]}
    unequal = {"sources": [{"model": a, "layer_range": [0, 2]}, {"model": base, "layer_range": [0, 3]}]}
    cycle: list[Any] = [one]
    cycle.append(cycle)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "linear", "models": [a, str(tmp_path / "short")]}, r"model.norm.weight.*\(8,\).*\(16,\)"),
        ({"method": "linear", "models": [a, str(tmp_path / "less")]}, "lacks the tensor"),
        ({"method": "linear", "models": [a, str(tmp_path / "nan")]}, "model.norm.weight.*nan.*NaN or Inf"),
        ({"method": "linaer", "models": [a]}, "did you mean 'linear'"),
        ({"merge_method": "tise", "models": [a]}, "did you mean 'ties'"),
        ({"merge_method": "ties", "modells": [a], "models": [a]}, "unknown key 'modells'; did you mean 'models'"),
        ({"merge_method": "sce", "base_model": base, "models": [a], "parameters": {"select_top": 1}}, "'select_topk'"),
        ({"method": "ties", "base": base, "models": [a], "parameters": {"density": 1.5}}, "must lie in"),
        ({"method": "ties", "models": [a]}, "needs a base"),
        ({"merge_method": "linear", "models": [{"model": a}]}, "'weight' has no value"),
        ({"merge_method": "slerp", "base_model": base, "models": [a], "parameters": {"t": "x"}}, "takes a number"),
        ({"method": "linear"}, "either 'models' or 'slices'"),
        ({"method": "linear", "modules": {"default": {"models": [a], "slices": []}}}, "default: a module has either"),
        ({"method": "linear", "modules": {"vision_tower": {"models": [a]}}}, "has no module 'vision_tower'"),
        ({"method": "linear", "modules": {"default": {"models": [a], "x": 1}}}, "default: unknown key 'x'"),
        ({"method": "linear", "models": []}, "at least one"),
        ({"method": "linear", "models": [{"model": None}]}, "'model' of one of 'models' is empty"),
        ({"models": [a]}, "give 'method'"),
        ({"method": "passthrough", "slices": [one]}, "has 4 layers"),
        ({"method": "linear", "slices": [unequal]}, "same number of layers"),
        ({"method": "passthrough", "slices": [{"sources": [{"model": a, "layer_range": [3, 1]}]}]}, "first smaller"),
        ({"method": "linear", "models": ["/nowhere/at/all"]}, "does not exist"),
        ({"method": "linear", "models": [a], "dtype": "int4"}, "'dtype' is one of"),
        ({"method": "linear", "models": [{"model": a, "weight": 1}]}, "stand under 'parameters'"),
        ({"method": "linear", "models": [f"{a}+{base}"]}, "is no adapter"),
        ({"method": "greedy_soup", "models": [a], "metric": "say 'it"}, "is no command"),
        ({"method": "greedy_soup", "models": [a], "metric": "\0"}, "cannot be run"),
        ({"method": "linear", "slices": cycle}, "contains itself"),
    ]  # fmt: skip
    for number, (config, sentence) in enumerate(cases):
        with pytest.raises(InputError, match=sentence) as caught:
            merged(config, tmp_path / f"out{number}")
        assert str(caught.value).count("\n") == 0
        assert not (tmp_path / f"out{number}").exists() and not (tmp_path / f"out{number}.partial").exists()
    with pytest.raises(InputError, match="one of the models"):
        merged({"method": "linear", "models": [a, base]}, Path(base))
    with pytest.raises(InputError, match="not valid YAML"):
        (tmp_path / "bad.yaml").write_text("a: [1")
        slimwright.merge(tmp_path / "bad.yaml", tmp_path / "x")
    with pytest.raises(InputError, match="cannot be read"):
        slimwright.merge(tmp_path / "missing.yaml", tmp_path / "x")


# -- greedy soup -------------------------------------------------------------------------------------------------------

METRIC = """
import sys
from safetensors.torch import load_file
value = load_file(sys.argv[1] + "/model.safetensors")["w"].mean()
print("distance to 1")
print(-abs(float(value) - 1))
"""


def test_a_greedy_soup_keeps_what_does_not_hurt(tmp_path: Path) -> None:
    """The metric is nearness to 1: 0.8 is best; with 1.3 the average is 1.05, better; with 0.1 it would be worse."""
    values = {"low": 0.1, "good": 0.8, "high": 1.3}
    for name, value in values.items():
        save_checkpoint(tmp_path / name, {"w": torch.full((4, 4), value)})
    (tmp_path / "metric.py").write_text(METRIC)
    config = {
        "method": "greedy_soup", "metric": f"{sys.executable} {tmp_path / 'metric.py'}",
        "models": [str(tmp_path / name) for name in values],
    }  # fmt: skip
    report = slimwright.merge(config, tmp_path / "out", quiet=True)
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert torch.allclose(found, torch.full((4, 4), 1.05), atol=1e-6)
    assert [Path(name).name for name in report["soup"]["chosen"]] == ["good", "high"]
    assert len(report["soup"]["tried"]) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "high", "low", "metric.py", "out"]
    with pytest.raises(SlimwrightError, match="gave no number"):
        slimwright.merge({**config, "metric": "false"}, tmp_path / "other", quiet=True)
    assert "finished result" in slimwright.merge(config, tmp_path / "out", quiet=True)["notes"][-1]
    with pytest.raises(InputError, match="needs 'models' and a 'metric'"):
        slimwright.merge(
            {"method": "linear", "metric": "x", "models": config["models"]}, tmp_path / "other", quiet=True
        )


FAILING = (
    METRIC
    + """
import os, pathlib
log = pathlib.Path(__file__).with_suffix(".log")
log.open("a").write(sys.argv[1].rpartition("/")[2] + " ")
if len(log.read_text().split()) == 4:
    os._exit(9)
"""
)


def test_a_resumed_soup_measures_nothing_twice(tmp_path: Path) -> None:
    """The metric dies at its fourth call; the second run makes that call and the one that is left."""
    for name, value in {"low": 0.1, "good": 0.8, "high": 1.3}.items():
        save_checkpoint(tmp_path / name, {"w": torch.full((4, 4), value)})
    (tmp_path / "metric.py").write_text(FAILING)
    config = {
        "method": "greedy_soup", "metric": f"{sys.executable} {tmp_path / 'metric.py'}",
        "models": [str(tmp_path / name) for name in ("low", "good", "high")],
    }  # fmt: skip
    with pytest.raises(SlimwrightError, match="exit 9"):
        slimwright.merge(config, tmp_path / "out", quiet=True)
    report = slimwright.merge(config, tmp_path / "out", quiet=True)
    calls = (tmp_path / "metric.log").read_text().split()
    assert calls == ["low", "good", "high", "candidate", "candidate", "candidate"]
    assert [Path(name).name for name in report["soup"]["chosen"]] == ["good", "high"]
    assert not (tmp_path / "out.partial").exists()


# -- LoRA extraction ---------------------------------------------------------------------------------------------------


def test_an_adapter_is_extracted_and_merges_back(tmp_path: Path) -> None:
    """A random change of rank 3 and a changed norm come back; PEFT loads the adapter, and the logits are the same."""
    peft = pytest.importorskip("peft")
    source = cached("llama", torch.float32)
    content = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    tuned = {name: tensor.clone() for name, tensor in content.items()}
    for name, tensor in tuned.items():
        if "proj" in name:
            out, into = tensor.shape
            tensor += 0.02 * torch.randn(out, 3, generator=generator) @ torch.randn(3, into, generator=generator)
    tuned["model.norm.weight"] += 0.1
    save_checkpoint(tmp_path / "tuned", tuned, config=json.loads((source / "config.json").read_text()))
    config = {"method": "lora_extract,max_rank=3", "base": str(source), "models": [str(tmp_path / "tuned")]}
    report = slimwright.merge(config, tmp_path / "adapter", quiet=True)
    assert report["adapter"]["relative_error"] < 1e-8 and report["adapter"]["whole"] == ["model.norm"]
    assert report["verified"]["ok"] and report["lineage"]["parents"]
    ledger = Counter(line["state"] for line in report["ledger"])
    changed = sum("proj" in name for name in content)
    assert ledger == {"merged": changed, "copied": 1, "unchanged": len(content) - changed - 1}
    assert "rank 3" in (tmp_path / "adapter" / "report.html").read_text()
    assert "base_model_relation: adapter" in (tmp_path / "adapter" / "README.md").read_text() or not report["notes"]
    back = merged({"method": "passthrough", "models": [f"{source}+{tmp_path / 'adapter'}"]}, tmp_path / "back")
    for name, tensor in back.items():
        assert torch.allclose(tensor, tuned[name], atol=1e-5), name
    tokens = torch.arange(3, 19).reshape(1, -1)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), str(tmp_path / "adapter"))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        assert torch.allclose(adapted(tokens).logits, expected(tokens).logits, atol=1e-3)
    smaller = method("merge/lora_extract", max_rank=2).merge(
        [tuned["model.layers.0.mlp.up_proj.weight"]], content["model.layers.0.mlp.up_proj.weight"]
    )
    change = tuned["model.layers.0.mlp.up_proj.weight"] - content["model.layers.0.mlp.up_proj.weight"]
    values = torch.linalg.svdvals(change)
    missed = (smaller - tuned["model.layers.0.mlp.up_proj.weight"]).norm() / change.norm()
    assert abs(float(missed) - float(values[2] / values.square().sum().sqrt())) < 1e-3
    with pytest.raises(InputError, match="nothing to extract"):
        slimwright.merge({**config, "models": [str(source)], "base": str(source) + "/"}, tmp_path / "none", quiet=True)


def test_a_killed_extraction_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("base", BASE), ("tuned", FIRST)):
        save_checkpoint(tmp_path / name, content, config=CONFIG)
    config = {"method": "lora_extract,max_rank=2", "base": str(tmp_path / "base"), "models": [str(tmp_path / "tuned")]}
    slimwright.merge(config, tmp_path / "whole", quiet=True)
    calls, factors = [], LoraExtract.factors

    def counted(self: LoraExtract, weight: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(weight.shape)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return factors(self, weight, base)

    monkeypatch.setattr(LoraExtract, "factors", counted)
    with pytest.raises(KeyboardInterrupt):
        slimwright.merge(config, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    slimwright.merge(config, tmp_path / "out", quiet=True)
    matrices = sum(tensor.ndim == 2 and "layers" in name for name, tensor in BASE.items())
    assert len(calls) == 4 + matrices - 3 + min(8, matrices)  # three were kept, eight are proven
    found = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert found[0] == found[1]


def test_a_damaged_adapter_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("base", BASE), ("tuned", FIRST)):
        save_checkpoint(tmp_path / name, content, config=CONFIG)
    config = {"method": "lora_extract,max_rank=2", "base": str(tmp_path / "base"), "models": [str(tmp_path / "tuned")]}
    write = extract.write_adapter

    def damaged(*given: Any) -> dict[str, Any]:
        found = write(*given)
        file = given[3] / "adapter_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x40  # of the exponent of the last number
        file.write_bytes(content)
        return found

    monkeypatch.setattr(extract, "write_adapter", damaged)
    with pytest.raises(SlimwrightError, match="not written as it should be"):
        slimwright.merge(config, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
