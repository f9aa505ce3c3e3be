"""Images, sounds, and tiny models that read them, for tests: each with a processor of its family."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor, WhisperProcessor

from tests.families import cached

SIDE = 32
RATE = 5120
SECONDS = 2.0
WORDS = [f"word{index}" for index in range(280)]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def tokenizer(special: dict[str, int], **settings: Any) -> PreTrainedTokenizerFast:
    """Words by number, 10 and on; special tokens at the ids that the tiny configs name."""
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, "user": 4, "assistant": 5, **special}
    vocabulary |= {word: 10 + index for index, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]",
        extra_special_tokens=list(special), **settings,
    )  # fmt: skip


def model_with_processor(family: str, directory: Path) -> Path:
    """A tiny checkpoint (vit, clip, llava or whisper) in bfloat16, with its processor."""
    shutil.copytree(cached(family, torch.bfloat16), directory, dirs_exist_ok=True)
    if family == "whisper":
        extractor = WhisperFeatureExtractor(
            feature_size=16, sampling_rate=RATE, chunk_length=int(SECONDS), n_fft=400, hop_length=160
        )
        WhisperProcessor(extractor, tokenizer({})).save_pretrained(directory)
        return directory
    from transformers import CLIPImageProcessorPil, CLIPProcessor, LlavaProcessor, ViTImageProcessorPil

    size = {"height": SIDE, "width": SIDE}
    if family == "vit":
        ViTImageProcessorPil(size=size).save_pretrained(directory)
        return directory
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    if family == "clip":
        CLIPProcessor(images, tokenizer({})).save_pretrained(directory)
    else:
        LlavaProcessor(
            images, tokenizer({"<image>": 300}), patch_size=8, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=TEMPLATE,
        ).save_pretrained(directory)  # fmt: skip
    return directory


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
    """A picture of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_sound(path: Path, seed: int, seconds: float = 1.0, rate: int = RATE) -> Path:
    """Noise, 16 bits, one channel."""
    samples = np.random.default_rng(seed).normal(0, 3000, int(seconds * rate)).astype("<i2")
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return path


def words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def write_rows(folder: Path, family: str, count: int = 24, **columns: Any) -> Path:
    """``rows.jsonl`` with what the family reads; texts have 5 to 8 words, sounds 0.5 to 1.4 seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        row: dict[str, Any] = {name: value(index) for name, value in columns.items()}
        if family == "whisper":
            row["audio"] = write_sound(folder / f"{index}.wav", index, 0.5 + 0.1 * (index % 10)).name
        else:
            row["image"] = write_image(folder / f"{index}.png", index).name
        if family != "vit":
            row["text"] = words(index, 5 + index % 4)
        rows.append(row)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"
