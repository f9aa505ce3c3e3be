"""Models fitted to the bytes of what other programs make of them: which loses less.

    python -m benchmarks.budgets [--models bundled qwen2] [--bits 3.25] [--seeds 0] [--peers llama.cpp] [--finished]

Every peer compresses the model at presets of its own near the bits asked, calibrated on the very tokens that ours has:
65,536 of the generic text, in rows of 512, others for every seed. Ours is a default `fit` to the peer's bytes. In the
column *free* each peer does with the embedding and the head what it does by default (llm-compressor and AutoRound leave
them as they are, llama.cpp rounds them); in the column *dense* both are left as they are in all of them.

Bytes are those of the tensors' data in the file that each program writes, the same for all: codes, scales, zero points,
indices and what stays dense, without headers and metadata. Ours never has more of them than the peer.

The loss is the KL divergence from the original in nats per token, on 128 held-out documents of 256 tokens each, the
same for all, computed here in float32 from the weights that a file stands for: every file is read, dequantized without
rounding again, and run by the same code, so that llama.cpp's rounding of activations costs it nothing. Of MiniLM, which
has no logits, it is one minus the cosine of mean hidden states. A peer counts only if the logits that its own program
computes of the dense model equal ours.

llm-compressor is looked for in PEERS/c, AutoRound in PEERS/e (else PEERS/c, which has it too), llama.cpp's
llama-imatrix and llama-quantize in LLAMA_CPP (PEERS/llama/bin) and its Python package in PEERS/d; what is missing is
left out by name. Finished rows go to bench-results/budgets.jsonl and are not made again; `--finished` makes none and
shows what there is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import slimwright
from benchmarks.budget_peers import DENSE, FREE, HELD_OUT, LENGTH, MAKERS, TOKENS, Subject, data_bytes, dense, missing
from benchmarks.common import RESULTS, Row, exit_code, publish, scratch
from slimwright.evaluate.bootstrap import interval, paired_interval

ROWS = RESULTS / "budgets.jsonl"
MOST_DENSE_KL = 1e-4
"""Nats per token between a peer's logits of the dense model and ours."""
LIMITS = {FREE: 0.8, DENSE: 0.95}
PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "llm-compressor": {"4.25": ("W4A16",), "3.25": ("W3A16",)},
    "autoround": {"4.25": ("W4A16",), "3.25": ("W3A16",)},
    "llama.cpp": {"4.25": ("IQ4_XS", "Q4_K_M"), "3.25": ("IQ3_XS", "Q3_K_M")},
}
"""Presets by program and bits."""


class Store:
    """Finished rows by what they are of, in a file that grows.

    Args:
        frozen: whether no further row is made.
    """

    def __init__(self, path: Path, frozen: bool = False) -> None:
        self.path, self.frozen = path, frozen
        path.parent.mkdir(exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = {json.dumps(row["of"]): row for row in map(json.loads, lines)}

    def get(self, of: list[Any], make: Callable[[], Row]) -> Row:
        """The row, made if it is not there.

        Raises:
            LookupError: it is not there, and none is made.
        """
        key = json.dumps(of)
        if key not in self.rows and self.frozen:
            raise LookupError(key)
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


def near(of: list[Any], store: Store) -> Row | None:
    """A row of ours for the same data with at most as many bytes as asked, and at least 99.5 % of them."""
    rows = [one for one in store.rows.values() if one["of"][:2] == of[:2] and one["of"][3:] == of[3:]]
    return max(
        (one for one in rows if 0.995 * of[2] <= one["bytes"] <= of[2]), key=lambda one: one["bytes"], default=None
    )


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
                if reason := missing(peer, name):
                    rows.append({"model": name, "peer": peer, "preset": f"left out: {reason}"})
                    continue
                for bits in options.bits:
                    for preset in [one for one in PRESETS[peer][bits] if one in (options.presets or (one,))]:
                        for column in options.columns:
                            rows.append(one(subject, peer, preset, bits, column, options, store))
    return rows


def one(
    subject: Subject, peer: str, preset: str, bits: str, column: str, options: argparse.Namespace, store: Store
) -> Row:
    """A peer's preset over the seeds, and ours at its bytes."""
    theirs, ours, row = [], [], {"model": subject.name, "bits": bits, "column": column, "peer": peer, "preset": preset}
    both = [] if peer != "llama.cpp" else [column]  # the others leave the ends as they are in both columns
    for seed in options.seeds:
        try:
            them = store.get(
                [subject.name, peer, preset, seed, *both],
                lambda seed=seed: peer_row(subject, peer, preset, seed, column),
            )
            header = max(
                (one.get("header", 0) for one in store.rows.values() if one["of"][0] == subject.name), default=0
            )
            of = [subject.name, "slimwright", them["bytes"], seed, column]
            us = near(of, store) or store.get(
                of, lambda seed=seed, them=them, header=header: our_row(subject, them["bytes"], seed, column, header)
            )
        except LookupError:
            continue
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr, flush=True)
            return row | {"preset": f"{preset}: failed: {str(error).strip().splitlines()[-1][:120]}"}
        theirs.append(them)
        ours.append(us)
    if not ours:
        return row | {"seeds": 0}
    row |= compared(pooled(theirs), pooled(ours))
    row |= {
        "bytes": theirs[0]["bytes"], "our_bytes": ours[0]["bytes"], "seeds": len(ours),
        "bits_all": 8 * theirs[0]["bytes"] / subject.structure.parameters,
        "ratios": [sum(us["sums"]) / sum(them["sums"]) for us, them in zip(ours, theirs, strict=True)],
        "dense_kl": max(them["dense_kl"] for them in theirs), "versions": theirs[-1]["versions"],
    }  # fmt: skip
    counts = row["dense_kl"] < MOST_DENSE_KL
    return row | ({"ok": row["ratio"] <= LIMITS[column]} if counts else {"preset": f"{preset}: other dense logits"})


def markdown(rows: list[Row]) -> str:
    """The table of docs/budgets.md."""
    lines = ["| model | peer | its bits per parameter | ends | its KL | ours | ratio | seeds |", "|---|" + "---|" * 7]
    for row in rows:
        if not row.get("seeds"):
            continue
        figures = [
            f"{row[f'{who}']:.4f} ({row[f'{who}_low']:.4f} to {row[f'{who}_high']:.4f})" for who in ("peers", "ours")
        ]
        ratio = f"**{row['ratio']:.2f}** ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        cells = [
            row["model"],
            f"{row['peer']} {row['preset']}",
            f"{row['bits_all']:.2f}",
            row["column"],
            *figures,
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} | {', '.join(f'{one:.2f}' for one in row['ratios'])} |")
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", default=["bundled", "qwen2", "gpt2", "qwen3-moe", "minilm"])
    arguments.add_argument("--bits", nargs="+", default=["4.25", "3.25"], choices=["4.25", "3.25"])
    arguments.add_argument("--columns", nargs="+", default=[FREE, DENSE], choices=[FREE, DENSE])
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--presets", nargs="+", help="of those of the peers; by default all")
    arguments.add_argument("--peers", nargs="+", default=list(MAKERS), choices=list(MAKERS))
    arguments.add_argument("--finished", action="store_true", help="make no further row")
    arguments.add_argument("--markdown", action="store_true", help="print the table of docs/budgets.md")
    options = arguments.parse_args()
    started = time.time()
    rows = table(options, Store(ROWS, options.finished))
    if options.markdown:
        print(markdown(rows))
    columns = {
        "model": "model", "bits": "bits", "column": "ends", "peer": "peer", "preset": "preset", "bits_all": "file bits",
        "seeds": "seeds", "peers": "peer's KL", "ours": "ours", "ratio": "ratio", "ratio_low": "low",
        "ratio_high": "high", "dense_kl": "dense KL", "ok": "ok",
    }  # fmt: skip
    return exit_code(publish("budgets", rows, columns, started, tokens=TOKENS, held_out=HELD_OUT))


if __name__ == "__main__":
    sys.exit(main())
