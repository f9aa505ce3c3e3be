"""What cannot work is refused in one sentence before anything is written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slimwright.errors import InputError
from slimwright.job.export import export
from slimwright.job.fit import FitReport, fit
from tests.job.conftest import PLAIN, fitted, tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny(), tmp_path / "model"))


def refused(model: Path | str, out: Path, message: str, **options: Any) -> None:
    """Refused with one sentence; nothing is left beside the model."""
    given = {"size": "40%", "quiet": True, **options}
    before = set(out.parent.iterdir())
    with pytest.raises(InputError, match=message) as error:
        fit(str(model), str(out), **{key: value for key, value in given.items() if value is not None})
    sentence = str(error.value)
    assert error.value.exit_code == 2
    assert len(sentence.splitlines()) == 1 and "Traceback" not in sentence and sentence.rstrip().endswith((".", "?"))
    assert set(out.parent.iterdir()) == before


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def wrong_magic(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(b"GGUF" + path.read_bytes()[4:])


def only_a_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def missing_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = list(load_file(model / "model-00001-of-00002.safetensors"))
    where = {name: "model-00001-of-00002.safetensors" for name in names}
    where[names[-1]] = "model-00002-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def missing_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (truncate, "model.safetensors"),
    (wrong_magic, "model.safetensors"),
    (missing_shard, "model-00002-of-00002.safetensors"),
    (missing_tensor, "up_proj"),
    (only_a_pickle, "pickle|pytorch_model.bin"),
    (lambda model: (model / "model.safetensors").unlink(), "safetensors"),
    (lambda model: (model / "config.json").unlink(), "config.json"),
    (lambda model: (model / "config.json").write_text("{"), "config.json"),
    (lambda model: edit_config(model, hidden_size=32), ".*"),
    (lambda model: edit_config(model, model_type="of_tomorrow", architectures=["OfTomorrow"]), "of_tomorrow"),
    (lambda model: edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    (lambda model: edit_config(model, quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    (lambda model: edit_config(model, quantization_config={"bits": 4}), "quantization_config"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_model(damage: Callable[[Path], object], message: str, model: Path, tmp_path: Path) -> None:
    damage(model)
    refused(model, tmp_path / "out", message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("options", [{"size": "40%"}, {"grid": "int4:g32"}], ids=("size", "grid"))
def test_weights_that_are_not_finite(
    value: float, name: str, options: dict[str, str], model: Path, tmp_path: Path
) -> None:
    """Found when the tensor is read, which is during work; the sentence names it and OUT does not appear."""
    tensors = load_file(model / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"'{name}' .*NaN or Inf") as error:
        fitted(str(model), tmp_path / "out", **options)
    assert error.value.exit_code == 2 and len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing is left in the way of the repaired model"


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"size": None}, "Give a limit"),
    ({"grid": "int4"}, "--size and --grid exclude each other"),
    ({"size": "4.25 fish"}, "--size '4.25 fish'"),
    ({"size": "1kB"}, "smallest possible is"),
    ({"size": None, "grid": "int9"}, "2 to 8"),
    ({"size": None, "grid": "intt4"}, "did you mean 'int4"),
    ({"method": "quantize/rtm"}, "did you mean 'quantize/rtn'"),
    ({"method": "quantize/rtn,clipp=mse"}, "clip"),
    ({"method": "quantize/rtn,steps=-1"}, "steps"),
    ({"method": "quantize/rtn,clip=some"}, "clip"),
    ({"search": "dpp"}, "did you mean 'dp'"),
    ({"rules": ("lm_hed: keep",)}, "did you mean"),
    ({"rules": ("lm_head = keep",)}, "not of the form"),
    ({"size": None, "plan": "absent.yaml"}, "absent.yaml"),
    ({"job_memory": "much"}, "--job-memory 'much'"),
    ({"job_memory": "1MB"}, "the least that would do is about [0-9]+ MB"),
    ({"job_time": 0.0}, "--job-time"),
    ({"job_time": 0.001}, "expected to take"),
    ({"surprise": 1}, "no option 'surprise'"),
    ({"data": "chat.jsonl"}, "--data chat.jsonl cannot be used.*has no tokenizer"),
    ({"data": "none", "method": "quantize/gptq"}, "quantize/gptq needs data"),
    ({"calibration_tokens": 3}, "--calibration-tokens must be at least 64"),
    ({"device": "cuda"}, "--device cuda"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_wrong_option(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(tiny(), tmp_path / "out", message, **options)


def test_no_output_directory() -> None:
    with pytest.raises(InputError, match="--out"):
        fit(tiny(), size="40%")


def test_an_output_directory_that_is_in_use(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(tiny(), out, "not empty")
    assert (out / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    refused(tiny(), tmp_path / "file", "is a file")


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("slimwright.job.fit.shutil.disk_usage", lambda path: usage._replace(free=1000))
    refused(tiny(), tmp_path / "out", "0.00 GB free, but the result needs|free, but")


@pytest.mark.parametrize("name", ["absent-directory", "./absent/model", "nobody/no-such-model", "a/b/c"])
def test_a_model_that_is_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(name, tmp_path / "out", name)


def test_export_refuses(result: FitReport, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match="plain weights already"):
        export(tiny(), out=out)
    with pytest.raises(InputError, match="cannot be written as gguf"):
        export(str(result.out), to="gguf", out=out)
    with pytest.raises(InputError, match="safetensors"):
        export(str(result.out), to="saftensors", out=out)
    with pytest.raises(InputError, match=r"absent"):
        export(str(tmp_path / "absent"), out=out)
    assert list(tmp_path.iterdir()) == []


def test_the_method_of_these_tests_exists() -> None:
    from slimwright.methods import parse_method

    assert parse_method(PLAIN)
