"""Models fitted to the bytes of what other programs make of them: which loses less.

    python -m benchmarks.budgets [--models bundled qwen2] [--bits 4.25 3.25] [--seeds 0 1 2] [--peers gptq ...]

Every peer compresses the model at presets of its own near the bits asked, calibrated on the very tokens that ours has:
65,536 of the generic text, in rows of 512, others for every seed. Ours is a default `fit` to the peer's bytes. In the
column *free* each peer does with the embedding and the head what it does by default (llm-compressor and AutoRound leave
them as they are, llama.cpp rounds them); in the column *dense* both are left as they are in all of them.

Bytes are those of the tensors' data in the file that each program writes, the same for all: codes, scales, zero points,
indices and what stays dense, without headers and metadata. Ours never has more of them than the peer.

The loss is the KL divergence from the original in nats per token, on 128 held-out documents of 256 tokens each, the
same for all, computed here in float32 from the weights that a file stands for: every file is read, dequantized without
rounding again, and run by the same code. That llama.cpp
rounds activations too costs it nothing.
A peer counts only if the logits that its own program computes of the dense model equal ours.

llm-compressor is looked for in PEERS/c, AutoRound in PEERS/e (else PEERS/c, which has it too), llama.cpp's
llama-imatrix and llama-quantize in LLAMA_CPP (PEERS/llama/bin) and its Python package in PEERS/d; what is missing is
left out by name. Finished rows go to bench-results/budgets.jsonl and are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimwright
from benchmarks.calibrated import path_of
from benchmarks.common import RESULTS, Row, exit_code, publish, scratch
from slimwright.calibrate.tokens import samples
from slimwright.checkpoint import Checkpoint
from slimwright.evaluate.bootstrap import interval, paired_interval
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
ROWS = RESULTS / "budgets.jsonl"
TOKENS, LENGTH = 65_536, 512
HELD_OUT = 128 * 256
CHECKED = 8
"""Rows of held-out text on which a peer's own logits are compared with ours."""
MOST_DENSE_KL = 1e-4
"""Nats per token between a peer's logits of the dense model and ours."""
FREE, DENSE = "free", "dense"
LIMITS = {FREE: 0.8, DENSE: 0.95}
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "llm-compressor": {"4.25": ("W4A16",), "3.25": ("W3A16",)},
    "autoround": {"4.25": ("W4A16",), "3.25": ("W3A16",)},
    "llama.cpp": {"4.25": ("IQ4_XS", "Q4_K_M"), "3.25": ("IQ3_XS", "Q3_K_M")},
}
"""Presets by program and bits."""


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


class Subject:
    """A model in bfloat16, the calibration's tokens for each seed, and the held-out text with the original's logits."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.path, self.wide = folder / "model", folder / "wide"
        _copy(path_of(name), self.path, torch.bfloat16)
        _copy(self.path, self.wide, torch.float32)
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
        """Logits (tokens, vocabulary) of each held-out document."""
        return logits(self.wide, self.held)

    def calibration(self, seed: int) -> tuple[Tensor, str]:
        """(rows, 512) int64 and their digest: just what `fit` calibrates on."""
        asked = FitOptions(model=str(self.path), size="4bit", calibration_tokens=TOKENS, seed=seed)
        _, found = with_data(asked, self.source, self.structure, lambda sentence: None)
        model = skeleton(self.source.config, self.source.model_path, self.source.tensors)
        made = samples(
            model, load_reader(self.source, model), found, tokens=TOKENS, length=LENGTH, seed=seed,
            experts=any(site.kind == "experts" for site in self.structure.sites.values()),
        )  # fmt: skip
        return torch.cat([batch.inputs["input_ids"] for batch in made.batches]), made.digest

    def kl(self, weights: Path) -> Row:
        """KL sums and tokens of each held-out document."""
        sums, tokens = [], []
        for before, after in zip(self.original, logits(weights, self.held), strict=True):
            found = compare_logits(before[:-1], after[:-1])["kl"]
            sums.append(float(found.sum()))
            tokens.append(len(found))
        return {"sums": sums, "tokens": tokens}

    def dense_kl(self, theirs: Iterable[Tensor]) -> float:
        """Mean KL between our logits of the dense model and others' on the first held-out documents."""
        pairs = zip(self.original[:CHECKED], theirs, strict=True)
        return float(torch.cat([compare_logits(ours, other.float())["kl"] for ours, other in pairs]).mean())


def logits(directory: Path, rows: Tensor) -> list[Tensor]:
    """(tokens, vocabulary) float32 of each row."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return [one for part in rows.split(4) for one in model(input_ids=part).logits]


def _copy(source: Path, out: Path, dtype: torch.dtype) -> None:
    """A model in another dtype: what stays dense then weighs the same in all programs."""
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(out)
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
    return _written(tensors, dict(source.config), out)


def _written(tensors: dict[str, Tensor], config: dict[str, Any], out: Path) -> Path:
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return out


def data_bytes(directory: Path) -> int:
    """Of the tensors in a directory's safetensors files."""
    return sum(info.stop - info.start for info in Checkpoint.open(str(directory)).tensors.values())


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
            "threads": torch.get_num_threads(),
        }  # fmt: skip
        (folder / "spec.json").write_text(json.dumps(spec))
        command([python, SCRIPTS / script, folder / "spec.json"], folder)
        found = torch.load(folder / "logits.pt")
        config = json.loads((folder / "out" / "config.json").read_text())
        (folder / "out" / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))  # read without rounding
        weights = dense(folder / "out", folder / "dense")
        own = [
            compare_logits(read, theirs)["kl"]
            for read, theirs in zip(logits(weights, subject.held[:CHECKED]), found["compressed"], strict=True)
        ]
        facts = {"dense_kl": subject.dense_kl(found["dense"]), "own_kl": float(torch.cat(own).mean())}
        return Made(weights, data_bytes(folder / "out"), facts | {"versions": found["versions"]})

    return made


def by_llama(subject: Subject, preset: str, seed: int, column: str, folder: Path) -> Made:
    """llama.cpp's quantization with an importance matrix of the same tokens."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    wide = subject.folder / "gguf" / FILE
    if not wide.exists():
        slimwright.export(str(subject.wide), to="gguf", out=str(wide.parent))
    rows, threads = subject.calibration(seed)[0], str(torch.get_num_threads())
    text = subject.tokenizer.decode(rows.flatten(), clean_up_tokenization_spaces=False)
    (folder / "calibration.txt").write_bytes(text.encode())
    spec = {
        "file": str(wide), "texts": subject.held[:CHECKED].tolist(), "strings": [text], "special": True,
        "result": str(folder / "found.npz"), "threads": int(threads),
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec))
    command([PEERS / "d" / "bin" / "python", SCRIPTS / "logits_llama_cpp.py", folder / "spec.json"], folder)
    found = np.load(folder / "found.npz")
    read = torch.from_numpy(found["tokens0"])
    same = int((read[: rows.numel()] == rows.flatten()[: len(read)]).sum()) / rows.numel()
    if same < 0.999:  # the last token of all may be half a character
        raise RuntimeError(f"llama.cpp reads {1 - same:.2%} of the calibration's tokens otherwise.")
    importance = folder / "imatrix.gguf"
    if not importance.exists():
        command(
            [LLAMA_CPP / "llama-imatrix", "-m", wide, "-f", folder / "calibration.txt", "-o", importance, "-c", LENGTH,
             "-b", LENGTH, "--parse-special", "-t", threads], folder,
        )  # fmt: skip
    ends = ["--token-embedding-type", "bf16", "--output-tensor-type", "bf16"] if column == DENSE else []
    out = folder / "out.gguf"
    command([LLAMA_CPP / "llama-quantize", "--imatrix", importance, *ends, wide, out, preset, threads], folder)
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
    weights = _written(tensors, dict(subject.source.config), folder / "dense")
    checked = [torch.from_numpy(found[f"logits{index}"]) for index in range(CHECKED)]
    versions = {"llama-cpp-python": str(found["version"])}
    return Made(weights, nbytes, {"dense_kl": subject.dense_kl(checked), "types": types, "versions": versions})


PYTHONS = {"llm-compressor": (PEERS / "c",), "autoround": (PEERS / "e", PEERS / "c"), "llama.cpp": (PEERS / "d",)}
MAKERS = {
    "llm-compressor": by_script("compress_llmcompressor.py", (PEERS / "c" / "bin" / "python",)),
    "autoround": by_script(
        "compress_autoround.py", (PEERS / "e" / "bin" / "python", PEERS / "c" / "bin" / "python")
    ),
    "llama.cpp": by_llama,
}  # fmt: skip


def missing(peer: str) -> str:
    """Why a peer is left out; empty: it is here."""
    if not any((place / "bin" / "python").exists() for place in PYTHONS[peer]):
        return f"there is no {PYTHONS[peer][0]}"
    if peer == "llama.cpp" and not (LLAMA_CPP / "llama-imatrix").exists():
        return f"there is no {LLAMA_CPP / 'llama-imatrix'}"
    return ""


# -- rows --------------------------------------------------------------------------------------------------------------


class Store:
    """Finished rows by what they are of, in a file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {json.dumps(row["of"]): row for row in map(json.loads, lines)}

    def get(self, of: list[Any], make: Callable[[], Row]) -> Row:
        """The row, made if it is not there; a failure is a row too, and is tried again the next time."""
        key = json.dumps(of)
        if key not in self.rows:
            started = time.monotonic()
            row = {"of": of} | make() | {"seconds": round(time.monotonic() - started, 1)}
            self.rows[key] = row
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            short = {key: value for key, value in row.items() if key not in ("sums", "tokens")}
            print(json.dumps(short | ({"kl": sum(row["sums"]) / sum(row["tokens"])})), flush=True)
        return self.rows[key]


def peer_row(subject: Subject, peer: str, preset: str, seed: int, column: str) -> Row:
    with scratch("budgets") as folder:
        made = MAKERS[peer](subject, preset, seed, column, folder)
        return {"bytes": made.nbytes} | made.facts | subject.kl(made.weights)


def our_row(subject: Subject, nbytes: int, seed: int, column: str, header: int) -> Row:
    """A default fit whose tensors weigh ``nbytes`` at most.

    Args:
        header: bytes that the file is expected to have beside its tensors; with them a second fit is made if need be.
    """
    with scratch("budgets") as folder:
        for attempt in ("first", "second", "third"):
            report = slimwright.fit(
                str(subject.path), str(folder / attempt), size=str(nbytes + header), seed=seed, quiet=True,
                calibration_tokens=TOKENS, calibration_length=LENGTH, eval_tokens=2048,
                rules=subject.ends if column == DENSE else (),
            )  # fmt: skip
            assert report["calibration"]["sha256"] == subject.calibration(seed)[1]
            found = data_bytes(folder / attempt)
            beside = report["size"]["after"] - found
            if found <= nbytes and (beside <= header or found >= 0.998 * nbytes):
                break
            header = beside if found <= nbytes else header - (found - nbytes)
        weights = dense(folder / attempt, folder / "dense")
        used = {"bytes": found, "header": beside, "predicted": report["search"]["predicted"]}
        return used | subject.kl(weights)


def compared(peer: Row, ours: Row) -> Row:
    """Both losses, and how ours relates to the peer's on the same documents, with intervals."""
    them, us = ((row["sums"], row["tokens"]) for row in (peer, ours))
    ratio = paired_interval(them, us, transform=np.log)
    low, high = interval(*us).to_json(), interval(*them).to_json()
    return {
        "ours": low["value"], "ours_low": low["low"], "ours_high": low["high"],
        "peers": high["value"], "peers_low": high["low"], "peers_high": high["high"],
        "ratio": float(np.exp(ratio.value)), "ratio_low": float(np.exp(ratio.low)),
        "ratio_high": float(np.exp(ratio.high)),
    }  # fmt: skip


def pooled(rows: list[Row]) -> Row:
    """Several seeds as one: sums by document added."""
    return {
        "sums": np.sum([row["sums"] for row in rows], axis=0).tolist(),
        "tokens": np.sum([row["tokens"] for row in rows], axis=0).tolist(),
    }


def table(options: argparse.Namespace, store: Store) -> list[Row]:
    """A row for each model, column, bits and peer over the seeds that are there."""
    rows: list[Row] = []
    for name in options.models:
        with scratch("budgets-model") as folder:
            subject = Subject(name, folder)
            for peer in options.peers:
                if reason := missing(peer):
                    rows.append({"model": name, "peer": peer, "preset": f"left out: {reason}"})
                    continue
                for bits in options.bits:
                    for preset in PRESETS[peer][bits]:
                        for column in options.columns:
                            rows.append(one(subject, peer, preset, bits, column, options, store))
    return rows


def one(
    subject: Subject, peer: str, preset: str, bits: str, column: str, options: argparse.Namespace, store: Store
) -> Row:
    """A peer's preset over the seeds, and ours at its bytes."""
    theirs, ours, row = [], [], {"model": subject.name, "bits": bits, "column": column, "peer": peer, "preset": preset}
    free = peer != "llama.cpp"  # leaves the ends as they are in both columns
    for seed in options.seeds:
        of = [subject.name, peer, preset, seed] + ([] if free else [column])
        try:
            them = store.get(of, lambda seed=seed: peer_row(subject, peer, preset, seed, column))
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr, flush=True)
            return row | {"preset": f"{preset}: failed: {str(error).strip().splitlines()[-1][:120]}"}
        header = max((one.get("header", 0) for one in store.rows.values() if one["of"][0] == subject.name), default=0)
        us = store.get(
            [subject.name, "slimwright", them["bytes"], seed, column],
            lambda seed=seed, them=them, header=header: our_row(subject, them["bytes"], seed, column, header),
        )
        theirs.append(them)
        ours.append(us)
    row |= compared(pooled(theirs), pooled(ours))
    row |= {
        "bytes": theirs[0]["bytes"], "our_bytes": ours[0]["bytes"], "seeds": len(ours),
        "bits_all": 8 * theirs[0]["bytes"] / subject.structure.parameters,
        "ratios": [sum(us["sums"]) / sum(them["sums"]) for us, them in zip(ours, theirs, strict=True)],
        "dense_kl": max(them["dense_kl"] for them in theirs), "versions": theirs[0]["versions"],
    }  # fmt: skip
    counts = row["dense_kl"] < MOST_DENSE_KL
    return row | ({"ok": row["ratio"] <= LIMITS[column]} if counts else {"preset": f"{preset}: other dense logits"})


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", default=["bundled", "qwen2", "gpt2"])
    arguments.add_argument("--bits", nargs="+", default=["4.25", "3.25"], choices=["4.25", "3.25"])
    arguments.add_argument("--columns", nargs="+", default=[FREE, DENSE], choices=[FREE, DENSE])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--peers", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    options = arguments.parse_args()
    started = time.time()
    rows = table(options, Store(ROWS))
    columns = {
        "model": "model", "bits": "bits", "column": "ends", "peer": "peer", "preset": "preset", "bits_all": "file bits",
        "seeds": "seeds", "peers": "peer's KL", "ours": "ours", "ratio": "ratio", "ratio_low": "low",
        "ratio_high": "high", "dense_kl": "dense KL", "ok": "ok",
    }  # fmt: skip
    return exit_code(publish("budgets", rows, columns, started, tokens=TOKENS, held_out=HELD_OUT))


if __name__ == "__main__":
    sys.exit(main())
