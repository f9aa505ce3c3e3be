"""Plans that drop sublayers and blocks: verified, rebuilt by plain ``from_pretrained``, written again, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import slimwright
from slimwright.checkpoint import Checkpoint, faults
from slimwright.errors import BudgetError, InputError
from slimwright.job import candidates, parallel
from slimwright.job.beside import Beside
from slimwright.job.drops import drop_nodes, kept_bytes
from slimwright.job.fit import FitReport, fit
from slimwright.job.open import open_source
from slimwright.job.request import FitOptions
from slimwright.job.running import Running, cache_by_block
from slimwright.model.discover import discover
from slimwright.model.surgery import droppable
from slimwright.plan import method_on
from slimwright.search import Option
from tests.families import cached
from tests.job.conftest import files, fitted, in_forked_child

LENGTH: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
GRIDS = ("int4:g32", "lowrank:r8:int8:g32", "int8:g64", "int3:g32+lowrank:r8:int8:g32", "keep")


def plan_file(path: Path, source: str, drops: list[str], grids: tuple[str, ...] = GRIDS, **more: Any) -> str:
    """A plan of mixed grids and low rank with drops."""
    groups = discover(open_source(source)).choice_groups()
    assignments = {
        name: {"grid": grid, "method": method_on(grid, "quantize/rtn,clip=none")}
        for name, grid in zip(groups, grids * len(groups))
    }
    path.write_text(yaml.safe_dump({"assignments": assignments, "edits": [{"drop": d} for d in drops], **more}))
    return str(path)


def planned(folder: Path, drops: list[str], family: str = "qwen2", **more: Any) -> FitReport:
    source = str(cached(family, torch.float32))
    plan = plan_file(folder / "plan.yaml", source, drops, **more)
    return fitted(source, folder / "out", plan=plan, method=None, data="none")


def zeroed(family: str, drops: list[str]) -> Any:
    """The source with the output projections under these names at zero, in float32."""
    model = AutoModelForCausalLM.from_pretrained(cached(family, torch.float32), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(tuple(f"{drop}." for drop in drops)) and ("o_proj" in name or "down_proj" in name):
                parameter.zero_()
    return model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> FitReport:
    return planned(tmp_path_factory.mktemp("drops"), ["model.layers.0.self_attn", "model.layers.1.mlp"])


def test_is_verified_and_generates_alike_cached_and_uncached(mixed: FitReport) -> None:
    assert mixed.out is not None and mixed["verified"]["ok"] and mixed["verified"]["logits_error"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(mixed.out, dtype=torch.float32)
    ids = torch.arange(10, 22)[None]
    uncached = model.generate(ids, **LENGTH, use_cache=False)
    for how in ({}, {"cache_implementation": "static"}, {"cache_implementation": "dynamic"}):
        assert torch.equal(model.generate(ids, **LENGTH, **how), uncached)


def test_the_ledger_accounts_for_what_is_gone(mixed: FitReport) -> None:
    gone = {line["site"]: line for line in mixed["ledger"] if line["state"] == "dropped"}
    assert {name.split(".")[3] for name in gone} == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
    assert all(
        line["bytes"] <= 1 and line["bytes_before"] > 0 and "dropped with" in line["reason"] for line in gone.values()
    )
    assert len(mixed["ledger"]) == len(Checkpoint.open(cached("qwen2", torch.float32)).tensors)
    assert mixed.out is not None
    assert yaml.safe_load((mixed.out / "plan.yaml").read_text())["edits"] == [
        {"drop": "model.layers.0.self_attn"}, {"drop": "model.layers.1.mlp"}
    ]  # fmt: skip


def test_is_compiled_as_one_graph(mixed: FitReport) -> None:
    assert mixed.out is not None
    model, ids = AutoModelForCausalLM.from_pretrained(mixed.out, dtype=torch.float32), torch.arange(3, 30)[None]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(ids)
        torch.testing.assert_close(compiled.logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert compiled.past_key_values.get_seq_length() == ids.shape[1]


def test_saves_again_unchanged(mixed: FitReport, tmp_path: Path) -> None:
    assert mixed.out is not None
    AutoModelForCausalLM.from_pretrained(mixed.out).save_pretrained(tmp_path)
    before, after = load_file(mixed.out / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    configs = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (mixed.out, tmp_path)]
    assert configs[0] == configs[1]


def test_without_slimwright_nothing_is_filled_at_random(mixed: FitReport) -> None:
    """The mark has another shape than the projection it stands for."""
    assert mixed.out is not None
    model = AutoModelForCausalLM.from_pretrained(cached("qwen2", torch.float32))
    state, written = model.state_dict(), load_file(mixed.out / "model.safetensors")
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert written[name].shape == (1,) and state[name].ndim == 2


def test_drops_alone_equal_the_zeroed_source(tmp_path: Path) -> None:
    drops = ["model.layers.1.self_attn"]
    report = planned(tmp_path, drops, grids=("keep",))
    assert report.out is not None and "import slimwright" in report["how_to_load"]
    model = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, zeroed("qwen2", drops)(ids).logits, atol=1e-5)


def test_a_dense_export_has_zeros(mixed: FitReport, tmp_path: Path) -> None:
    dense = slimwright.export(str(mixed.out), out=str(tmp_path / "dense"))
    assert dense.out is not None
    tensors = load_file(dense.out / "model.safetensors")
    assert tensors.keys() == load_file(cached("qwen2", torch.float32) / "model.safetensors").keys()
    assert not tensors["model.layers.0.self_attn.o_proj.weight"].any()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        plain, own = (
            AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)(ids).logits for d in (dense.out, mixed.out)
        )
        back = AutoModelForCausalLM.from_pretrained(mixed.out, dtype=torch.float32).dequantize()(ids).logits
    assert torch.allclose(plain, own, atol=1e-4) and torch.allclose(back, own, atol=1e-4)


@pytest.mark.parametrize("grids", [("keep",), GRIDS])
def test_a_block_is_gone_and_those_after_it_are_renumbered(tmp_path: Path, grids: tuple[str, ...]) -> None:
    report = planned(tmp_path, ["model.layers.0"], family="gemma3", grids=grids)
    assert report.out is not None and report["verified"]["ok"]
    config = json.loads((report.out / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["layer_types"] == ["full_attention"]
    assert not any(name.startswith("model.layers.1.") for name in Checkpoint.open(report.out).tensors)
    new = {line["site"]: line["written"] for line in report["ledger"] if line["written"]}
    assert new["model.layers.1.mlp.up_proj.weight"] == "model.layers.0.mlp.up_proj.weight"
    if grids == ("keep",):
        assert "quantization_config" not in config and "import slimwright" not in report["how_to_load"]
    ids = torch.arange(3, 30)[None]
    model = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32)
    assert torch.equal(model.generate(ids, **LENGTH), model.generate(ids, **LENGTH, use_cache=False))
    if grids == ("keep",):
        with torch.no_grad():
            wanted = zeroed("gemma3", ["model.layers.0"])(ids).logits
            assert torch.allclose(model(ids).logits, wanted, atol=1e-4)


def test_solved_with_data_behind_a_fold(tmp_path: Path) -> None:
    """The walks see the model without what was dropped, and the proof makes the reference by itself."""
    source = str(cached("llama", torch.float32))
    groups = discover(open_source(source)).choice_groups()
    plan = {
        "assignments": {name: {"grid": "int4:g32", "method": "quantize/gptq"} for name in groups},
        "edits": [{"method": "fold/smoothquant"}, {"drop": "model.layers.0.mlp"}, {"drop": "model.layers.1"}],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    report = fitted(
        source, tmp_path / "out", plan=str(tmp_path / "plan.yaml"), method=None, calibration_tokens=256,
        calibration_length=32,
    )  # fmt: skip
    states = {line["state"] for line in report["ledger"]}
    assert report["verified"]["ok"] and {"calibrated", "dropped"} <= states


@pytest.mark.parametrize(
    ("family", "drop", "said"),
    [
        ("llama", "model.layers.0.slf_attn", "did you mean 'model.layers.0.self_attn'"),
        ("llama", "model.layers.9", "is no block"),
        ("jamba", "model.layers.0.mamba", "keeps a state of its own"),
        ("bert", "bert.encoder.layer.0", "does not give back what it is given"),
        ("t5", "encoder.block.0.layer.0.SelfAttention", "gives its neighbours more than its output"),
        ("jamba", "model.layers.0", "no config of a JambaForCausalLM describes"),
    ],
)
def test_refuses_by_name(tmp_path: Path, family: str, drop: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        planned(tmp_path, [drop], family=family, grids=("keep",))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_refuses_all_blocks_and_edits_of_two_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep one at least"):
        planned(tmp_path, ["model.layers.0", "model.layers.1"])
    (tmp_path / "both.yaml").write_text("edits: [{drop: model.layers.0, method: fold/awq}]\nassignments: {}\n")
    with pytest.raises(InputError, match="either 'method' or 'drop'"):
        fit(str(cached("qwen2", torch.float32)), str(tmp_path / "x"), plan=str(tmp_path / "both.yaml"))


def test_a_crash_between_units_ends_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_pool", None)  # threads do not survive a fork
    cached("qwen2", torch.float32)  # before a child would build it for itself

    def run(folder: str) -> FitReport:
        (tmp_path / folder).mkdir(exist_ok=True)
        return planned(tmp_path / folder, ["model.layers.0"])

    assert in_forked_child(lambda: run("cut"), SLIMWRIGHT_CRASH_AT="write:4") == faults.CRASH_STATUS
    whole = run("whole")
    again = run("cut")
    assert again.out is not None and whole.out is not None and files(again.out) == files(whole.out)


@pytest.fixture(scope="module")
def idle_attention(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose second attention gives nothing: its output projection is zero."""
    directory = tmp_path_factory.mktemp("idle") / "model"
    shutil.copytree(cached("qwen2", torch.float32), directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"].zero_()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return str(directory)


def searched(source: str, out: Path, **options: Any) -> FitReport:
    asked = {"size": "25%", "allow": ("drop",), "method": None, "calibration_tokens": 512, "calibration_length": 32}
    return fitted(source, out, **{**asked, **options})


@pytest.mark.parametrize("solver", ["dp", "milp"])
def test_a_search_drops_what_gives_nothing(idle_attention: str, tmp_path: Path, solver: str) -> None:
    report = searched(idle_attention, tmp_path / "out", search=solver)
    assert report.out is not None and report["verified"]["ok"]
    assert 0.99 * report["budget"]["bytes"] <= report["size"]["after"] <= report["budget"]["bytes"]
    edits = yaml.safe_load((report.out / "plan.yaml").read_text())["edits"]
    found = {edit["drop"]: edit["reason"] for edit in edits}
    assert "predicted loss 0 nats" in found["model.layers.1.self_attn"]
    model = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32)
    ids = torch.arange(10, 22)[None]
    assert torch.equal(model.generate(ids, **LENGTH), model.generate(ids, **LENGTH, use_cache=False))


def test_a_search_drops_under_a_floor_and_a_memory_with_a_packed_cache(
    idle_attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The idle attention goes whatever limits the result; what the cache packs are the layers that are left."""

    def running(directory: Path, asked: Any, scratch: Path) -> Running:
        return Running(64, 1, Checkpoint.open(directory).total_bytes, 1000, 1_000_000)

    monkeypatch.setattr(candidates, "measure_running", running)
    monkeypatch.setattr("slimwright.job.running.first_guess", lambda source, asked: (0, 1_000_000))
    policy = "cache/kivi,bits=4,residual_length=32"
    for name, limit in {"floor": {"keep": ("kl:0.5",)}, "memory": {"memory": "1.05MB", "context": 64}}.items():
        report = searched(idle_attention, tmp_path / name, size=None, cache=policy, **limit)
        assert report.out is not None and report["verified"]["ok"]
        plan = yaml.safe_load((report.out / "plan.yaml").read_text())
        assert {edit["drop"] for edit in plan["edits"]} & {"model.layers.1.self_attn", "model.layers.1"}
        assert plan["cache"] == {"*": policy}
        assert len(report["cache"]["layers"]) == 1
        model = AutoModelForCausalLM.from_pretrained(report.out, dtype=torch.float32)
        assert torch.isfinite(model(torch.arange(10, 22)[None]).logits).all()


def test_bytes_of_the_cache_that_drops_free(idle_attention: str) -> None:
    source = open_source(idle_attention)
    structure = discover(source)
    by_block = cache_by_block(source, structure, FitOptions(idle_attention, running=(64, 3)))
    config = AutoConfig.from_pretrained(idle_attention)
    layer = 3 * 64 * config.num_key_value_heads * 2 * (config.hidden_size // config.num_attention_heads) * 4
    assert by_block == dict.fromkeys((f"model.layers.{i}" for i in range(config.num_hidden_layers)), layer)
    nodes = drop_nodes(source, structure, droppable(source, structure), {}, 1 << 20)
    beside = Beside(by_block)
    assert sum(beside.held(nodes).values()) == beside.most == layer * config.num_hidden_layers
    for dropped in (["model.layers.0"], ["model.layers.0.self_attn", "model.layers.1.mlp"]):
        choices = {name: Option(name, "drop", 0, 0.0) for name in dropped}
        assert beside.of_choices(choices, nodes) == beside.most - layer
    counted = beside.of_nodes(nodes)
    assert beside.rest(nodes) == 0 and beside.rest([]) == beside.most
    assert kept_bytes(counted) == kept_bytes(nodes) + beside.most
    assert [node.drop for node in counted] == [node.drop for node in nodes]  # what is dropped holds nothing


def test_a_memory_that_only_the_cache_exceeds(
    idle_attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention goes although every weight could stay; what is left is used."""
    source = open_source(idle_attention)
    layer = cache_by_block(source, discover(source), FitOptions(idle_attention, running=(128, 64)))["model.layers.0"]

    def measured(directory: Path, asked: Any, scratch: Path, low_memory: bool = False) -> Running:
        plan = directory / "plan.yaml"
        edits = yaml.safe_load(plan.read_text()).get("edits", []) if plan.exists() else []
        gone = {edit["drop"].split(".")[2] for edit in edits if not edit["drop"].endswith("mlp")}
        cache = (2 - len(gone)) * layer
        return Running(128, 64, Checkpoint.open(directory).total_bytes, cache, cache + 100_000)

    monkeypatch.setattr(candidates, "measure_running", measured)
    asked = {"size": None, "context": 128, "batch": 64}
    limit = layer + 250_000
    report = searched(idle_attention, tmp_path / "out", memory=f"{limit}B", **asked)
    assert report.out is not None and report["verified"]["ok"]
    plan = yaml.safe_load((report.out / "plan.yaml").read_text())
    assert {edit["drop"] for edit in plan["edits"]} == {"model.layers.1.self_attn"}
    assert 0.93 * limit <= report["running"]["total"] <= limit and report["running"]["cache"] == layer
    assert report["search"]["beside_bytes"] == layer
    with pytest.raises(InputError, match="the KV cache alone takes"):
        searched(idle_attention, tmp_path / "none", memory=f"{limit}B", **{**asked, "allow": ()})


def test_the_smallest_size_there_can_be(idle_attention: str, tmp_path: Path) -> None:
    """No config describes a model without blocks: all sublayers are dropped, and what that leaves was priced."""
    with pytest.raises(BudgetError) as raised:
        searched(idle_attention, tmp_path / "none", size="1B")
    report = searched(idle_attention, tmp_path / "out", size=f"{raised.value.smallest}B")
    assert report.out is not None and report["verified"]["ok"]
    assert raised.value.smallest - 200 <= report["size"]["after"] <= raised.value.smallest
    edits = yaml.safe_load((report.out / "plan.yaml").read_text())["edits"]
    assert len(edits) == 2 * AutoConfig.from_pretrained(idle_attention).num_hidden_layers


def test_a_rule_keeps_what_it_binds(idle_attention: str, tmp_path: Path) -> None:
    report = searched(idle_attention, tmp_path / "out", rules=["*.layers.1.self_attn.*: int8:g64"])
    gone = {line["site"] for line in report["ledger"] if line["state"] == "dropped"}
    assert not any(name.startswith(("model.layers.1.self_attn", "model.layers.1.input")) for name in gone)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"allow": "dorp", "size": "30%"}, "did you mean 'drop'"),
        ({"allow": "prune", "size": "30%"}, "designed but not built"),
        ({"allow": "drop", "grid": "int8:row"}, "give --size"),
        ({"allow": "drop", "size": "30%", "data": "none"}, "found on data"),
    ],
)
def test_refuses_what_may_not_be_allowed(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(str(cached("qwen2", torch.float32)), str(tmp_path / "out"), quiet=True, **options)
