"""What `benchmarks.budgets` compares: models with their data, and other programs that compress them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import slimwright
from benchmarks.calibrated import path_of
from benchmarks.common import Row
from slimwright.calibrate.tokens import samples
from slimwright.checkpoint import Checkpoint
from slimwright.evaluate.divergence import compare_logits
from slimwright.formats.gguf import permuted_rows
from slimwright.job.calibration import with_data
from slimwright.job.exports.gguf import FILE, gguf_profile
from slimwright.job.held_out import held_out, load_reader
from slimwright.job.open import derived, open_source
from slimwright.job.request import FitOptions
from slimwright.job.weights import site_rows
from slimwright.model.discover import discover
from slimwright.model.skeleton import skeleton

PEERS = Path(os.environ.get("PEERS", "/tmp/peers"))
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", PEERS / "llama" / "bin"))
SCRIPTS = Path(__file__).with_name("peers")
TOKENS, LENGTH = 65_536, 512
HELD_OUT = 128 * 256
CHECKED = 8
"""Rows of held-out text on which a peer's own outputs are compared with ours."""
FREE, DENSE = "free", "dense"


class Subject:
    """A model in bfloat16, the calibration's tokens for each seed, and the held-out text with the original's outputs:
    logits, or of an encoder the last hidden states."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.path, self.wide = folder / "model", folder / "wide"
        self.encoder = name == "minilm"
        self.auto = AutoModel if self.encoder else AutoModelForCausalLM
        self._copy(path_of(name), self.path, torch.bfloat16)
        self._copy(self.path, self.wide, torch.float32)
        self.source = open_source(str(self.path))
        self.structure = discover(self.source)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.ends = tuple(f"{n}: keep" for n, site in self.structure.sites.items() if site.role in ("embed", "head"))

    @cached_property
    def held(self) -> Tensor:
        """(documents, tokens) int64."""
        model = skeleton(self.source.config, self.source.model_path, self.source.tensors)
        _, batches = held_out(
            self.source, model, data="", eval_data="", tokens=HELD_OUT, batch_tokens=1024, seed=0
        )  # fmt: skip
        return torch.cat([batch.inputs["input_ids"] for batch in batches])

    @cached_property
    def original(self) -> list[Tensor]:
        """(tokens, features) of each held-out document."""
        return self.outputs(self.wide, self.held)

    def calibration(self, seed: int) -> tuple[list[Tensor], str]:
        """Rows of 512 token ids, of an encoder at most so many, and their digest: just what `fit` calibrates on."""
        asked = FitOptions(model=str(self.path), size="4bit", calibration_tokens=TOKENS, seed=seed)
        _, found = with_data(asked, self.source, self.structure, lambda sentence: None)
        model = skeleton(self.source.config, self.source.model_path, self.source.tensors)
        made = samples(
            model, load_reader(self.source, model), found, tokens=TOKENS, length=LENGTH, seed=seed,
            experts=any(site.kind == "experts" for site in self.structure.sites.values()),
        )  # fmt: skip
        found = []
        for batch in made.batches:
            mask = batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
            found += [row[own] for row, own in zip(batch.inputs["input_ids"], mask.bool(), strict=True)]
        return found, made.digest

    def kl(self, weights: Path) -> Row:
        """What each held-out document loses: KL sums and tokens; of an encoder one minus the cosine, and 1."""
        found = [self.lost(*pair) for pair in zip(self.original, self.outputs(weights, self.held), strict=True)]
        return {"sums": [float(one.sum()) for one in found], "tokens": [len(one) for one in found]}

    def lost(self, before: Tensor, after: Tensor) -> Tensor:
        """(tokens,) KL, or (1,) one minus the cosine between the means of hidden states."""
        if self.encoder:
            return 1 - torch.cosine_similarity(before.double().mean(0), after.double().mean(0), 0)[None]
        return compare_logits(before[:-1], after[:-1])["kl"]

    def apart(self, theirs: Iterable[Tensor], ours: Iterable[Tensor] | None = None) -> float:
        """Mean loss of others' outputs on the first held-out documents against ours, by default the original's."""
        pairs = zip(self.original[:CHECKED] if ours is None else ours, theirs, strict=True)
        return float(torch.cat([self.lost(here, there.float()) for here, there in pairs]).mean())

    def outputs(self, directory: Path, rows: Tensor) -> list[Tensor]:
        """(tokens, features) float32 of each row."""
        model = self.auto.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            return [one for part in rows.split(4) for one in model(input_ids=part)[0]]

    def _copy(self, source: Path, out: Path, dtype: torch.dtype) -> None:
        """The model in another dtype: what stays dense then weighs the same in all programs."""
        self.auto.from_pretrained(source, dtype=dtype).save_pretrained(out)
        for file in source.glob("tokenizer*"):
            shutil.copy(file, out)


def dense(directory: Path, out: Path) -> Path:
    """Dense float32 weights of a result of ours or of a checkpoint that we read, as the file has them."""
    source = open_source(str(directory))
    sites = discover(source).sites
    tensors = {}
    for name in source.tensors:
        site = sites.get(name)
        if site is None or not derived(source, name):
            tensors[name] = source.read(name).float().contiguous()
            continue
        weight = site_rows(source, site, slice(0, site.rows)).reshape(site.weight_shape).float()
        tensors[name] = (weight.transpose(-1, -2) if site.transposed else weight).contiguous()
    return written(tensors, dict(source.config), out)


def written(tensors: dict[str, Tensor], config: dict[str, Any], out: Path) -> Path:
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return out


def data_bytes(directory: Path) -> int:
    """Of the tensors in a directory's safetensors files."""
    return sum(info.stop - info.start for info in Checkpoint.open(str(directory)).tensors.values())


@dataclass(frozen=True)
class Made:
    """What a peer made.

    Attributes:
        weights: the model that it stands for, a directory with dense float32 weights.
        nbytes: of the tensors' data in its file.
        facts: for the row: the KL between its dense logits and ours, versions.
    """

    weights: Path
    nbytes: int
    facts: Row


# -- peers -------------------------------------------------------------------------------------------------------------


def command(words: Iterable[str | Path], folder: Path) -> str:
    """Run a program of a peer's, and what it printed."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=clean, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, errors="replace",
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def by_script(script: str, pythons: tuple[Path, ...]) -> Callable[[Subject, str, int, str, Path], Made]:
    """A peer whose script writes a checkpoint that we read."""

    def made(subject: Subject, preset: str, seed: int, column: str, folder: Path) -> Made:
        python = next(python for python in pythons if python.exists())
        torch.save(subject.calibration(seed)[0], folder / "calibration.pt")
        torch.save(subject.held[:CHECKED], folder / "check.pt")
        spec = {
            "model": str(subject.path), "calibration": str(folder / "calibration.pt"), "scheme": preset,
            "check": str(folder / "check.pt"), "out": str(folder / "out"), "logits": str(folder / "logits.pt"),
            "threads": torch.get_num_threads(), "auto": subject.auto.__name__,
        }  # fmt: skip
        (folder / "spec.json").write_text(json.dumps(spec))
        command([python, SCRIPTS / script, folder / "spec.json"], folder)
        found = torch.load(folder / "logits.pt")
        config = json.loads((folder / "out" / "config.json").read_text())
        (folder / "out" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # read without rounding
        weights = dense(folder / "out", folder / "dense")
        read = subject.outputs(weights, subject.held[:CHECKED])
        facts = {"dense_kl": subject.apart(found["dense"]), "own_kl": subject.apart(found["compressed"], read)}
        return Made(weights, data_bytes(folder / "out"), facts | {"versions": found["versions"]})

    return made


@cache
def importance(subject: Subject, seed: int) -> tuple[Path, Path, float]:
    """The model as GGUF in float32, llama.cpp's importance matrix, and the KL between its dense logits and ours."""
    wide, folder = subject.folder / "gguf" / FILE, subject.folder / f"imatrix-{seed}"
    if not wide.exists():
        slimwright.export(str(subject.wide), to="gguf", out=str(wide.parent))
    folder.mkdir()
    ids, out = torch.cat(subject.calibration(seed)[0]), folder / "imatrix.gguf"
    text = subject.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    (folder / "calibration.txt").write_bytes(text.encode())
    logits, read = run_llama(subject, wide, folder, text)
    same = float((read[: len(ids)] == ids[: len(read)]).sum()) / len(ids)
    if same < 0.999:  # the last token of all may be half a character
        raise RuntimeError(f"llama.cpp reads {1 - same:.2%} of the calibration's tokens otherwise.")
    command(
        [LLAMA_CPP / "llama-imatrix", "-m", wide, "-f", folder / "calibration.txt", "-o", out, "-c", LENGTH,
         "-b", LENGTH, "--parse-special", "-t", torch.get_num_threads()], folder,
    )  # fmt: skip
    return wide, out, subject.apart(logits)


def by_llama(subject: Subject, preset: str, seed: int, column: str, folder: Path) -> Made:
    """llama.cpp's quantization with an importance matrix of the same tokens."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    wide, matrix, dense_kl = importance(subject, seed)
    ends = ["--token-embedding-type", "bf16", "--output-tensor-type", "bf16"] if column == DENSE else []
    out = folder / "out.gguf"
    command(
        [LLAMA_CPP / "llama-quantize", "--imatrix", matrix, *ends, wide, out, preset, torch.get_num_threads()], folder
    )  # fmt: skip
    names = {short: name for name, short in gguf_profile(subject.source, subject.structure).names.items()}
    tensors, nbytes, types = {}, 0, dict[str, int]()
    for one in GGUFReader(out).tensors:
        nbytes += int(one.n_bytes)
        types[one.tensor_type.name] = types.get(one.tensor_type.name, 0) + 1
        name, value = names[one.name], torch.from_numpy(np.array(dequantize(one.data, one.tensor_type), np.float32))
        site, info = subject.structure.sites.get(name), subject.source.tensors[name]
        order = permuted_rows(name, value.shape[0], subject.source.config)
        if order is not None:
            value = torch.empty_like(value).index_copy_(0, order, value)
        value = value.t() if site is not None and site.transposed else value
        tensors[name] = value.reshape(info.shape).contiguous()
    weights = written(tensors, dict(subject.source.config), folder / "dense")
    own, _ = run_llama(subject, out, folder, "text")
    facts = {
        "dense_kl": dense_kl, "types": types,
        "own_kl": subject.apart(own, subject.outputs(weights, subject.held[:CHECKED])),
        "versions": {"llama.cpp": llama_version()},
    }  # fmt: skip
    return Made(weights, nbytes, facts)


def run_llama(subject: Subject, file: Path, folder: Path, text: str) -> tuple[list[Tensor], Tensor]:
    """llama.cpp's logits of the first held-out documents, and its tokens of a text."""
    spec = {
        "file": str(file), "texts": subject.held[:CHECKED].tolist(), "strings": [text], "special": True,
        "result": str(folder / "found.npz"), "threads": torch.get_num_threads(),
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    command([PEERS / "d" / "bin" / "python", SCRIPTS / "logits_llama_cpp.py", folder / "spec.json"], folder)
    found = np.load(folder / "found.npz")
    return [torch.from_numpy(found[f"logits{index}"]) for index in range(CHECKED)], torch.from_numpy(found["tokens0"])


def llama_version() -> str:
    """Of the programs that were used."""
    return command([LLAMA_CPP / "llama-imatrix", "--version"], Path.cwd()).split("version: ")[-1].splitlines()[0]


NO_GGUF = {
    "qwen3-moe": "a mixture of experts is not written as gguf here",
    "minilm": "BERT is not written as gguf here",
    "qwen2": "transformers splits text as Qwen2's own tokenizer does, not as this model's tokenizer.json says",
}
PYTHONS = {"llm-compressor": (PEERS / "c",), "autoround": (PEERS / "e", PEERS / "c"), "llama.cpp": (PEERS / "d",)}
MAKERS = {
    "llm-compressor": by_script("compress_llmcompressor.py", (PEERS / "c" / "bin" / "python",)),
    "autoround": by_script(
        "compress_autoround.py", (PEERS / "e" / "bin" / "python", PEERS / "c" / "bin" / "python")
    ),
    "llama.cpp": by_llama,
}  # fmt: skip


def missing(peer: str, model: str) -> str:
    """Why a peer is left out; empty: it is here."""
    if not any((place / "bin" / "python").exists() for place in PYTHONS[peer]):
        return f"there is no {PYTHONS[peer][0]}"
    if peer == "llama.cpp" and model in NO_GGUF:
        return NO_GGUF[model]
    if peer == "llm-compressor" and model == "gpt2":
        return "the weights are no Linear modules"
    if peer == "autoround" and model == "gpt2":
        return "its files do not say which weights are stored transposed, so that they cannot be read"
    if peer == "llama.cpp" and not (LLAMA_CPP / "llama-imatrix").exists():
        return f"there is no {LLAMA_CPP / 'llama-imatrix'}"
    return ""
