"""Decoding with llama.cpp, in an environment with llama-cpp-python and gguf: ``python decode_llama.py KIND MODEL``.

KIND: llama-q4_0 (Q4_0, embedding and head Q8_0) or llama-q8_0. The checkpoint, a Qwen2, is written as GGUF beside the
system's temporary files first. Speaks as decode_torch.py does.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from answering import serve

PROMPT, PREFILL, ROOM = 32, 512, 256
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def tensors(path: Path):
    """Names and float32 values of a safetensors file of bfloat16."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                file.seek(8 + size + start)
                halves = np.frombuffer(file.read(stop - start), np.uint16).astype(np.uint32)
                yield name, (halves << 16).view(np.float32).reshape(entry["shape"])


def convert(source: Path, target: Path, kind: str) -> None:
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    eight, four = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
    for file in sorted(source.glob("*.safetensors")):
        for name, values in tensors(file):
            if name.startswith("model.layers."):
                index, rest = name.removeprefix("model.layers.").split(".", 1)
                stem, suffix = rest.rsplit(".", 1)
                new = f"blk.{index}.{NAMES[stem]}.{suffix}"
            else:
                new = "token_embd.weight" if name == "model.embed_tokens.weight" else "output_norm.weight"
            if values.ndim == 1:
                writer.add_tensor(new, values)
                continue
            grid = four if kind == "llama-q4_0" and "embd" not in new else eight
            writer.add_tensor(new, gguf.quantize(values, grid), raw_dtype=grid)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Decoder:
    """A model and a context; sequences of every batch start anew, since they share the cache."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_log_set(_silent, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        how = llama_cpp.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch, how.n_seq_max = 4096, 1024, 512, 32
        how.n_threads = how.n_threads_batch = threads
        if hasattr(how, "kv_unified"):
            how.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(self.model, how)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(1024, 0, 1)

    def forward(self, rows: list[list[int]], start: int) -> list[int]:
        """The best next token of every row."""
        batch, n = self.batch, 0
        last = []
        for row, tokens in enumerate(rows):
            for position, token in enumerate(tokens):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, start + position, 1
                batch.seq_id[n][0] = row
                batch.logits[n] = position == len(tokens) - 1
                n += 1
            last.append(n - 1)
        batch.n_tokens = n
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        found = []
        for index in last:
            logits = llama_cpp.llama_get_logits_ith(self.context, index)
            found.append(int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax()))
        return found

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def decode(self, batch: int) -> float:
        self.forget()
        steps, generator = 8 if batch == 1 else 4 if batch <= 8 else 2, np.random.default_rng(0)
        tokens = self.forward([generator.integers(0, 1000, PROMPT).tolist() for _ in range(batch)], 0)
        started = 0.0
        for step in range(-1, steps):
            if step == 0:  # one step before, which does not count
                started = time.perf_counter()
            tokens = self.forward([[token] for token in tokens], PROMPT + 1 + step)
        return (time.perf_counter() - started) / steps

    def first(self) -> float:
        self.forget()
        started = time.perf_counter()
        tokens = self.forward([np.random.default_rng(0).integers(0, 1000, PROMPT).tolist()], 0)
        self.forward([tokens], PROMPT)
        return time.perf_counter() - started

    def prefill(self) -> float:
        self.forget()
        ids = np.random.default_rng(0).integers(0, 1000, PREFILL).tolist()
        started = time.perf_counter()
        self.forward([ids], 0)
        return time.perf_counter() - started


@llama_cpp.llama_log_callback
def _silent(level, text, data):
    pass


def main() -> None:
    kind, source = sys.argv[1], Path(sys.argv[2])
    path = Path(tempfile.gettempdir()) / f"slimwright-{source.name}-{kind}.gguf"
    if not path.exists():
        convert(source, path, kind)
    serve(Decoder(path, int(os.environ["OMP_NUM_THREADS"])))


if __name__ == "__main__":
    main()
