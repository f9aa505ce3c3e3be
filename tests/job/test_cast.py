"""Wide tensors that are no sites may be stored in 16 bits: chosen by the search, written, proven, planned by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError, SlimwrightError
from slimwright.job import build as building
from slimwright.job import options, tiles
from slimwright.job import verify as verification
from slimwright.job.export import export
from slimwright.job.fit import FitReport
from slimwright.job.open import open_source
from slimwright.job.options import option_costs, score_options
from slimwright.job.units import Unit
from slimwright.model import discover as discovery
from slimwright.model.discover import discover
from slimwright.model.structure import Structure
from slimwright.plan import KEEP, Assignment, Plan
from tests.families import FAMILIES, cached
from tests.job.conftest import PLAIN, files, fitted, tiny

PATCHES = "deit.embeddings.patch_embeddings.projection.weight"
POSITIONS = "deit.embeddings.position_embeddings"
FUSED = tuple(f"nomic_bert.encoder.layers.{layer}.attn.Wqkv.weight" for layer in (0, 1))
CASTABLE = {"deit": (PATCHES, POSITIONS), "nomic_bert": FUSED}
"""Per family: a convolution and a table that is added; tensors that transformers splits on load."""


def wide(name: str) -> str:
    """A tiny checkpoint in float32; never write to it."""
    return str(cached(name, torch.float32))


def structure_of(model: str | Path) -> Structure:
    return discover(open_source(str(model)))


def plan_file(path: Path, structure: Structure, grids: Mapping[str, Assignment | str]) -> Path:
    """A plan that keeps everything but the named tensors."""
    assignments = {group: Assignment(grid=KEEP) for group in structure.choice_groups()}
    for name, grid in grids.items():
        assignments[name] = grid if isinstance(grid, Assignment) else Assignment(grid=grid)
    path.write_text(Plan(assignments=assignments).to_yaml())
    return path


@pytest.fixture(scope="module", params=sorted(CASTABLE))
def cast(request: pytest.FixtureRequest, in_this_process: None, tmp_path_factory: pytest.TempPathFactory) -> FitReport:
    """A tiny float32 model at 40 %, its first castable tensor in fp16 and its second in bf16; never write to it."""
    return with_both(request.param, tmp_path_factory.mktemp("cast"))


def with_both(name: str, folder: Path) -> FitReport:
    """The model with one tensor in each of the two dtypes, everything else as it is."""
    first, second = CASTABLE[name]
    plan = plan_file(folder / "plan.yaml", structure_of(wide(name)), {first: "fp16", second: "bf16"})
    return fitted(wide(name), folder / "out", plan=str(plan))


def verified(report: FitReport, written: Path) -> verification.Outcome:
    """The outcome of verifying a directory against the source and plan of a report."""
    spec = verification.Spec(
        source=report["model"]["path"], written=str(written), result="", tokens=64, batch_tokens=64, threads=1
    )
    return verification.verify(spec, lambda done, total: None, "this process")


# -- what may be cast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CASTABLE))
def test_only_wide_tensors_may_be_cast(name: str) -> None:
    assert structure_of(wide(name)).castable == CASTABLE[name]
    for dtype in (torch.bfloat16, torch.float16):
        assert structure_of(cached(name, dtype)).castable == ()


def test_routers_norms_ties_and_integers_are_never_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "SMALLEST_SITE", 1)
    for name in ("mixtral", "bert", "qwen2"):
        structure = structure_of(wide(name))
        kept = {tensor for tensor in structure.kept if structure.roles[tensor] not in ("router", "norm")}
        assert set(structure.castable) == kept - set(structure.ties)
        assert any(structure.roles[tensor] == "norm" for tensor in structure.kept)
    assert any(role == "router" for role in structure_of(wide("mixtral")).roles.values())


# -- whole jobs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CASTABLE))
def test_a_small_budget_is_met_by_casting_and_its_plan_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    report = fitted(wide(name), tmp_path / "out", size="40%")
    assert report["verified"]["ok"] and report.out is not None
    assert 0.99 * report["budget"]["bytes"] <= report["size"]["after"] <= report["budget"]["bytes"]
    lines = {line["site"]: line for line in report["ledger"] if line["method"] == "cast"}
    assert lines and set(lines) <= set(CASTABLE[name])
    written = Checkpoint.open(report.out)
    for tensor, line in lines.items():
        assert written.tensors[tensor].dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[line["grid"]]
    packed = {n for names in written.config["quantization_config"]["grids"].values() for n in names}
    assert not packed & set(lines)
    again = fitted(wide(name), tmp_path / "again", plan=str(report.out / "plan.yaml"))
    assert files(tmp_path / "again") == files(report.out) and again["ledger"] == report["ledger"]


def test_the_line_of_a_cast_tensor(cast: FitReport) -> None:
    lines = {line["site"]: line for line in cast["ledger"]}
    source = Checkpoint.open(cast["model"]["path"])
    tensors = next(tensors for tensors in CASTABLE.values() if set(tensors) <= lines.keys())
    for tensor, grid, dtype in zip(tensors, ("fp16", "bf16"), (torch.float16, torch.bfloat16), strict=True):
        line, weight = lines[tensor], source.read(tensor).double()
        error = float((weight - weight.to(dtype).double()).square().sum() / weight.square().sum())
        assert (line["state"], line["grid"], line["method"], line["bits"]) == ("data-free", grid, "cast", 16)
        assert line["bytes"] == 2 * weight.numel() == line["bytes_before"] // 2
        assert line["error_before"] == line["error_after"] == pytest.approx(error, rel=1e-3)
        assert 0 < error < 1e-4
    assert all(line["state"] == "kept" for line in lines.values() if line["site"] not in tensors)


def test_plain_transformers_reads_a_result_of_casts_alone(cast: FitReport) -> None:
    assert cast.out is not None and "import slimwright" not in cast["how_to_load"]
    assert "quantization_config" not in json.loads((cast.out / "config.json").read_text())
    assert cast["verified"]["ok"]


def test_a_grid_everywhere_casts_nothing(tmp_path: Path) -> None:
    report = fitted(wide("deit"), tmp_path / "out", grid="int4:g32")
    lines = {line["site"]: line for line in report["ledger"]}
    assert lines[PATCHES]["state"] == lines[POSITIONS]["state"] == "kept"


def test_an_interrupted_job_continues_with_its_casts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and finished casts are taken from the journal, and the bytes are those of an uninterrupted run."""
    whole = fitted(wide("deit"), tmp_path / "whole", size="40%")
    cast_rows, seen = tiles._cast_rows, list[str]()

    def once(source: Checkpoint, unit: Unit, *rest: Any) -> Any:
        seen.append(unit.name)
        if len(seen) == 2:
            raise SlimwrightError("interrupted")
        return cast_rows(source, unit, *rest)

    monkeypatch.setattr(tiles, "_cast_rows", once)
    monkeypatch.setattr(building, "COMMIT_BYTES", 1)
    with pytest.raises(SlimwrightError, match="interrupted"):
        fitted(wide("deit"), tmp_path / "out", size="40%")
    monkeypatch.setattr(options, "score_casts", lambda *_: pytest.fail("was scored twice"))
    report = fitted(wide("deit"), tmp_path / "out", size="40%")
    assert len(seen) == 3 and seen[2] == seen[1] != seen[0]
    assert files(tmp_path / "out") == files(tmp_path / "whole") and report["ledger"] == whole["ledger"]


def test_a_result_with_casts_is_a_source_and_can_be_exported(tmp_path: Path) -> None:
    report = fitted(wide("deit"), tmp_path / "out", size="40%")
    export(str(report.out), to="safetensors", out=str(tmp_path / "dense"))
    dense = Checkpoint.open(tmp_path / "dense")
    written = Checkpoint.open(tmp_path / "out")
    chosen = [line["site"] for line in report["ledger"] if line["method"] == "cast"]
    assert all(torch.equal(dense.read(name), written.read(name)) for name in chosen)
    assert fitted(str(report.out), tmp_path / "smaller", size="39%")["verified"]["ok"]


def test_the_model_keeps_its_dtype_where_the_config_says_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes the dtype of the tensor that is first by name, here a cast one, for the whole model's."""
    monkeypatch.setattr(discovery, "SMALLEST_SITE", 1)
    model = Path(shutil.copytree(wide("deit"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    structure = structure_of(model)
    assert min(structure.bytes) in structure.castable
    plan = plan_file(tmp_path / "plan.yaml", structure, dict.fromkeys(structure.castable, "fp16"))
    report = fitted(str(model), tmp_path / "out", plan=str(plan))
    assert FAMILIES["deit"].model_class.from_pretrained(report.out).dtype == torch.float32


# -- the proof -----------------------------------------------------------------------------------------------------


def damaged(report: FitReport, folder: Path, tensor: str) -> Path:
    """A copy of a result with one value of a tensor that is used for every input changed."""
    assert report.out is not None
    out = Path(shutil.copytree(report.out, folder / "damaged"))
    info = Checkpoint.open(out).tensors[tensor]
    path = out / info.file.name
    content = bytearray(path.read_bytes())
    middle = info.start + info.nbytes // 2 // 2 * 2
    content[middle : middle + 2] = b"\x00\x42"  # 3 in fp16, 32 in bf16
    path.write_bytes(content)
    return out


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("files_too", [True, False], ids=("files", "outputs"))
def test_a_wrong_value_is_noticed(
    cast: FitReport, which: int, files_too: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the comparison of the files, and where that is left out, by the reference model alone."""
    tensor = CASTABLE[cast["model"]["family"]][which]
    assert cast.out is not None
    if not files_too:
        monkeypatch.setattr(verification, "compare_files", lambda *args: (0, None))
    assert verified(cast, cast.out).ok
    problems = verified(cast, damaged(cast, tmp_path, tensor)).problems
    assert problems
    assert all(tensor in problem if files_too else "differ from the reference" in problem for problem in problems)


def test_the_reference_has_the_cast_values(cast: FitReport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the casts it differs from the written model, and by more than the two should."""
    assert cast.out is not None
    error = verified(cast, cast.out).logits_error
    monkeypatch.setattr(verification, "planned_tensors", lambda source, structure, plan: None)
    without = verified(cast, cast.out)
    assert without.logits_error > 20 * max(error, 1e-9)


# -- values that are too large -------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """DeiT with a value beyond fp16 in its table of positions."""
    model = Path(shutil.copytree(wide("deit"), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors[POSITIONS].view(-1)[-3] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_value_beyond_fp16_is_never_cast_to_it(large: Path, tmp_path: Path) -> None:
    """The loss is finite for the others, and the losses survive the journal."""
    source = open_source(str(large))
    structure = discover(source)
    table = option_costs(source, structure, {}, PLAIN, 100_000)
    found: dict[str, list[float | None]] = {}
    scored = score_options(source, structure, table, {}, found.__setitem__)
    assert [option.label for option in scored[POSITIONS]] == ["keep", "bf16"]
    assert [option.label for option in scored[PATCHES]] == ["keep", "fp16", "bf16"]
    keep, half, brain = (option.loss for option in scored[PATCHES])
    assert keep == 0 < half < brain / 20
    again: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    assert score_options(source, structure, table, again, lambda *_: pytest.fail("was scored twice")) == scored


def test_a_job_with_a_value_beyond_fp16(large: Path, tmp_path: Path) -> None:
    report = fitted(str(large), tmp_path / "out", size="40%")
    line = next(line for line in report["ledger"] if line["site"] == POSITIONS)
    assert line["grid"] == "bf16" and report["verified"]["ok"]
    assert torch.isfinite(Checkpoint.open(tmp_path / "out").read(POSITIONS)).all()


def test_a_plan_that_casts_it_all_the_same_is_refused(large: Path, tmp_path: Path) -> None:
    plan = plan_file(tmp_path / "plan.yaml", structure_of(large), {POSITIONS: "fp16"})
    with pytest.raises(InputError, match=f"'{POSITIONS}' holds values beyond the range of torch.float16"):
        fitted(str(large), tmp_path / "out", plan=str(plan))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("planned", [True, False], ids=("plan", "size"))
def test_a_source_that_is_not_finite(value: float, planned: bool, large: Path, tmp_path: Path) -> None:
    tensors = load_file(large / "model.safetensors")
    tensors[POSITIONS].view(-1)[7] = value
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    plan = plan_file(tmp_path / "plan.yaml", structure_of(large), {POSITIONS: "bf16"})
    with pytest.raises(InputError, match=f"'{POSITIONS}' .*NaN or Inf"):
        fitted(str(large), tmp_path / "out", plan=str(plan) if planned else None, size=None if planned else "40%")


# -- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_with_casts_reads_what_it_wrote(tmp_path: Path) -> None:
    structure = structure_of(wide("deit"))
    assignment = Assignment(grid="bf16", method="cast", reason="why not")
    plan = Plan.load(plan_file(tmp_path / "plan.yaml", structure, {POSITIONS: assignment, PATCHES: KEEP}))
    plan.check(structure)
    assert plan.assignments[POSITIONS] == assignment
    assert plan.casts(structure) == {POSITIONS: torch.bfloat16}
    assert Plan(assignments={g: Assignment(grid=KEEP) for g in structure.choice_groups()}).casts(structure) == {}


@pytest.mark.parametrize(
    ("model", "tensor", "assignment", "message"),
    [
        ("wide", PATCHES, {"grid": "int4:g32"}, f"'{PATCHES}' on int4:g32.*keep, fp16, bf16"),
        ("wide", PATCHES, {"grid": "fp8"}, "on fp8"),
        ("wide", PATCHES, {"grid": "fp16", "method": "quantize/rtn"}, "its method can only be 'cast'"),
        ("wide", PATCHES + "s", {"grid": "fp16"}, f"did you mean '{PATCHES}'"),
        ("wide", "deit.layernorm.weight", {"grid": "fp16"}, r"has no choice \(norm\)"),
        ("narrow", PATCHES, {"grid": "bf16"}, r"has no choice \(convolution\)"),
    ],
)
def test_a_plan_that_cannot_be(
    model: str, tensor: str, assignment: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = wide("deit") if model == "wide" else tiny("deit")
    plan = plan_file(tmp_path / "plan.yaml", structure_of(path), {tensor: Assignment.model_validate(assignment)})
    with pytest.raises(SlimwrightError, match=message) as refused:
        fitted(path, tmp_path / "out", plan=str(plan))
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "out").exists()
