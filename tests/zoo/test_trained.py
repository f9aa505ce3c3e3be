"""The zoo's cache: models made once, whole or not at all, the same every time, and loadable without Slimwright."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slimwright
from slimwright import zoo
from slimwright.checkpoint import weights_hash
from slimwright.errors import InputError
from slimwright.job import cache
from slimwright.job.open import located, open_source
from slimwright.zoo import objectives, trained, training
from slimwright.zoo.__main__ import main
from slimwright.zoo.recipes import RECIPES
from slimwright.zoo.text import Document, Part, standard_library

STEPS = 2
MODELS = ("gpt2", "qwen2", "qwen3-moe", "bert", "vit", "t5")
ROOT = Path(__file__).parents[2]

pytest.importorskip("sklearn")


def few(part: Part) -> list[Document]:
    """Little text: what tokenizers are trained on, and what is measured, takes no time."""
    kept = [document for document in standard_library(part) if document.path.startswith(("asyncio/", "email/"))]
    return [Document(document.path, document.text[:4000]) for document in kept[:4]]


def make_small(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """An empty cache, little text, small steps."""
    patch.setenv("SLIMWRIGHT_CACHE", str(directory))
    patch.setattr(objectives, "standard_library", few)
    patch.setattr(objectives, "TOKENS_PER_STEP", 1024)
    patch.setattr(objectives.Digits, "ROWS", 16)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every model of the zoo and one fine-tune, trained for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, tmp_path_factory.mktemp("cache"))
        return {name: trained.trained(name, STEPS) for name in (*MODELS, "bundled-network")}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    make_small(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


LOADER = """
import json, sys, torch, transformers
from pathlib import Path
found = {}
for name, directory in json.loads(sys.argv[1]).items():
    config = transformers.AutoConfig.from_pretrained(directory)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
    model.eval()
    with torch.no_grad():
        if name == "vit":
            assert model(torch.zeros(1, 3, 8, 8)).logits.shape == (1, 10)
        else:
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
            assert len(tokenizer) <= config.vocab_size
            text = "import os\\n"
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
            inputs = tokenizer(text, return_tensors="pt")
            if name == "bert":
                assert inputs.input_ids[0, 0] == tokenizer.cls_token_id and tokenizer.mask_token == "[MASK]"
                assert model(**inputs).logits.isfinite().all()
            else:
                longer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
                assert longer.shape[1] == (4 if name == "t5" else inputs.input_ids.shape[1] + 3)
    found[name] = str(model.dtype)
assert not any(module.split(".")[0] == "slimwright" for module in sys.modules)
print(json.dumps(found))
"""


def test_plain_transformers_loads_each(shared: dict[str, Path], tmp_path: Path) -> None:
    directories = json.dumps({name: str(path) for name, path in shared.items()})
    done = subprocess.run(
        [sys.executable, "-c", LOADER, directories], cwd=tmp_path, check=False, text=True, capture_output=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        name: "torch.bfloat16" if "qwen" in name or "bundled" in name else "torch.float32" for name in shared
    }


def test_each_is_inspected(shared: dict[str, Path]) -> None:
    for name, directory in shared.items():
        structure = slimwright.inspect(str(directory))
        assert [len(stack.blocks) for stack in structure.stacks] == {
            "t5": [2, 2],
            "bert": [3],
            "bundled-network": [5],
        }.get(name, [4])
    assert any("experts" in tensor for tensor in open_source(str(shared["qwen3-moe"])).tensors)


def test_the_record_says_what_was_measured(shared: dict[str, Path]) -> None:
    for name, directory in shared.items():
        facts = trained.record(directory)
        assert facts["name"] == name and facts["steps"] == STEPS and facts["seconds"] > 0
        assert (0 <= facts["value"] <= 1) if facts["higher_is_better"] else 0.5 < facts["value"] < 30
        assert ("before" in facts) == (name == "bundled-network")
        card = (directory / "README.md").read_text()
        assert f"{facts['value']:.4f}" in card and card.startswith("---\nlicense: apache-2.0")


def test_the_second_time_nothing_is_trained(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained.trained("vit", STEPS)
    monkeypatch.setattr(trained, "train", None)
    monkeypatch.setattr(trained, "claim", None)
    assert trained.trained("vit", STEPS) == first
    entries = cache.entries()
    assert [entry["name"] for entry in entries] == [first.name] and entries[0]["bytes"] > 5_000_000
    assert cache.remove([first.name]) == entries[0]["bytes"] and not first.exists()


@pytest.mark.parametrize("name", ["qwen3-moe", "t5"])
def test_the_same_weights_every_time(name: str, own: Path, shared: dict[str, Path]) -> None:
    torch.rand(3)  # whatever was drawn before
    state = torch.get_rng_state()
    again = trained.trained(name, STEPS)
    assert again != shared[name] and weights_hash(again) == weights_hash(shared[name])
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's random numbers are left alone
    assert (again / "tokenizer.json").read_bytes() == (shared[name] / "tokenizer.json").read_bytes()


def test_a_stopped_training_leaves_nothing_and_is_resumed(
    own: Path, shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trained, "SAVE_EVERY", 1)
    with monkeypatch.context() as patch:
        keep = training._keep

        def stop(*arguments: object) -> None:
            keep(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        patch.setattr(training, "_keep", stop)
        with pytest.raises(KeyboardInterrupt):
            trained.trained("gpt2", STEPS)
    assert [path.suffix for path in own.iterdir()] == [".partial"]
    assert "step 1 of 2" in capsys.readouterr().err
    resumed = trained.trained("gpt2", STEPS)
    shown = capsys.readouterr().err
    assert "step 2 of 2" in shown and "step 1 of 2" not in shown
    assert weights_hash(resumed) == weights_hash(shared["gpt2"])
    assert sorted(path.name for path in own.iterdir()) == [resumed.name]


def test_two_processes_train_once(own: Path) -> None:
    script = f"from slimwright.zoo.trained import trained; print(trained('vit', {STEPS}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    results = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert results[0][0] == results[1][0] and Path(results[0][0].strip(), "model.safetensors").is_file()
    assert sum(errors.count("step 1 of 2") for _, errors in results) == 1


def test_a_claim_that_is_held_is_waited_for(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process holds the claim; when it lets go without a result, this one trains."""
    key = trained._key("vit", STEPS)
    own.mkdir()
    held = trained.claim(own / f"zoo-vit-{key[:12]}", key)
    monkeypatch.setattr(trained.time, "sleep", lambda seconds: held.release())
    assert (trained.trained("vit", STEPS) / "config.json").is_file()
    assert "another process is training it" in capsys.readouterr().err


def test_unknown_names_are_refused_with_the_nearest(own: Path) -> None:
    for refused in (lambda: zoo.model("gtp2"), lambda: open_source("zoo:gtp2"), lambda: slimwright.inspect("zoo:gtp2")):
        with pytest.raises(InputError, match=r"no model 'gtp2'.*did you mean 'gpt2'"):
            refused()
    assert not own.exists()


def test_verbs_take_the_zoos_models(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained.trained("vit", STEPS)
    asked = []
    monkeypatch.setattr(trained, "trained", lambda name: asked.append(name) or path)
    assert open_source("zoo:vit").path == path and asked == ["vit"]
    assert located("zoo:vit") == str(path) and located("hub/zoo:vit") == "hub/zoo:vit"


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLIMWRIGHT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set SLIMWRIGHT_CACHE"):
        zoo.model("vit")
    monkeypatch.setenv("SLIMWRIGHT_CACHE", str(tmp_path / "room"))
    monkeypatch.setattr(trained, "FREE_BYTES", 1 << 60)
    with pytest.raises(InputError, match="MB free"):
        zoo.model("vit")


def test_digits_without_scikit_learn(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        trained.trained("vit", STEPS)


def test_fine_tunes_are_four_models_of_the_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "model", Path)
    assert {topic: path.name for topic, path in zoo.fine_tunes().items()} == {
        topic: f"bundled-{topic}" for topic in ("interface", "network", "build", "formats")
    }


def test_the_command_line(
    own: Path, shared: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(RECIPES) and "trained" not in "".join(listed)
    assert main(["gtp2"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("slimwright: The zoo has no model 'gtp2'") and len(shown.err) < 400
    monkeypatch.setattr("slimwright.zoo.__main__.trained", lambda name: shared[name])
    assert main(["bundled-network"]) == 0
    path, figure = capsys.readouterr().out.splitlines()
    assert Path(path) == shared["bundled-network"] and figure.startswith("held-out bits per byte: ")
