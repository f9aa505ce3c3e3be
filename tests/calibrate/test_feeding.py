"""What models are fed of images and sounds: values by hand, what counts and what does not, one-sentence refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="Pillow, which reads images, is not installed")
from PIL import Image

from slimwright.calibrate.data import Document, documents
from slimwright.calibrate.feeding import Feed, Row, batches_of, fed, load_processor, usable
from slimwright.calibrate.tokens import samples
from slimwright.calibrate.walk import Batch, Walk
from slimwright.checkpoint import Checkpoint
from slimwright.errors import InputError
from slimwright.model.discover import discover
from slimwright.model.skeleton import skeleton
from tests.families import FAMILIES, make
from tests.media import (
    RATE,
    SECONDS,
    SIDE,
    model_with_processor,
    tokenizer,
    words,
    write_image,
    write_rows,
    write_sound,
)

HOP = 160
READS = {
    "vit": {"image"}, "swin": {"image"}, "clip": {"image", "text"}, "llava": {"image", "text"},
    "paligemma": {"image", "text"}, "whisper": {"audio", "text"}, "t5": {"text"}, "bert": {"text"}, "llama": {"text"},
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("media")
    return {family: model_with_processor(family, root / family) for family in ("vit", "clip", "llava", "whisper")}


def feed_of(place: Path, length: int = 64) -> Feed:
    source = Checkpoint.open(str(place))
    model = skeleton(source.config, source.model_path, source.tensors)
    return Feed(model, load_processor(place, fed(model)), length)


@pytest.mark.parametrize("family", sorted(READS))
def test_what_each_family_reads(family: str) -> None:
    assert fed(make(family)) == READS[family]


def test_pixels_by_hand(places: dict[str, Path], tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.png", 1, (SIDE, SIDE))
    row = feed_of(places["vit"]).row(Document("x", image=str(path)))
    by_hand = (torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
    torch.testing.assert_close(row.inputs["pixel_values"], by_hand.float(), rtol=1e-6, atol=1e-6)
    assert row.tokens == (SIDE // 8) ** 2 and not row.masks


def test_the_image_stands_before_the_text_and_only_text_is_predicted(places: dict[str, Path], tmp_path: Path) -> None:
    feed, image = feed_of(places["llava"]), str(write_image(tmp_path / "x.png", 1))
    row = feed.row(Document("x", words(0, 6), image=image))
    known = [10 + int(word.removeprefix("word")) for word in words(0, 6).split()]
    assert row.inputs["input_ids"].tolist() == [[1, *[300] * 16, *known, 2]]
    assert row.outputs is not None and row.outputs.tolist() == [[True, *[False] * 16, *[True] * 7]]
    placed = feed.row(Document("x", f"{words(0, 3)} <image> {words(1, 3)}", image=image))
    assert placed.inputs["input_ids"][0, 4:20].tolist() == [300] * 16, "a placeholder in the text stays where it is"
    chat = feed.row(Document("x", messages=({"role": "user", "content": words(0, 3)},), image=image))
    assert chat.inputs["input_ids"][0, :18].tolist() == [1, 4, *[300] * 16], "through the chat template"
    pair = feed.row(Document("x", words(0, 3), words(1, 2), image=image))
    assert pair.inputs["input_ids"][0].tolist().count(5) == 1, "the second of a pair is what the assistant says"
    cut = feed_of(places["llava"], length=4).row(Document("x", words(0, 60), image=image))
    assert cut.inputs["input_ids"].shape == cut.inputs["attention_mask"].shape == (1, 16 + 4)


def test_silence_after_a_sound_does_not_count(places: dict[str, Path], tmp_path: Path) -> None:
    feed, seconds = feed_of(places["whisper"]), 0.7
    path = write_sound(tmp_path / "x.wav", 1, seconds)
    row = feed.row(Document("x", words(0, 5), audio=str(path)))
    frames = -(-int(seconds * RATE) // HOP)
    (mask,) = row.masks
    positions = int(SECONDS * RATE) // HOP // 2
    assert mask.shape == (1, positions) and int(mask.sum()) == -(-frames // 2) < positions
    assert row.inputs["input_features"].shape == (1, 16, 2 * positions)
    known = [10 + int(word.removeprefix("word")) for word in words(0, 5).split()]
    assert row.inputs["decoder_input_ids"].tolist() == [[1, *known]], "its first token, and the text without its end"
    assert row.tokens == -(-frames // 2) + 6
    full = feed.row(Document("x", "word1", audio=str(write_sound(tmp_path / "full.wav", 1, SECONDS))))
    assert not full.masks
    batch = batches_of([row, feed.row(Document("y", words(1, 5), audio=str(path)))], 4096)[0]
    hidden = torch.arange(2.0 * positions)[None].reshape(2, positions, 1)
    assert torch.equal(batch.counted(hidden), hidden[mask.expand(2, -1)])
    assert batch.counted(torch.zeros(2, 6, 3)).shape == (12, 3), "the decoder's sequence counts wholly"


def test_a_decoder_as_long_as_the_encoder_gets_another_length(places: dict[str, Path], tmp_path: Path) -> None:
    path = write_sound(tmp_path / "x.wav", 1, 0.5)
    row = feed_of(places["whisper"]).row(Document("x", words(0, 31), audio=str(path)))
    assert row.inputs["decoder_input_ids"].shape == (1, 31) and row.masks[0].shape == (1, 32)


def test_rows_of_equal_shapes_share_batches_and_nothing_is_padded() -> None:
    rows = [
        Row({"x": torch.full((1, length), float(i))}, length, str(i)) for i, length in enumerate([3, 5, 3, 3, 5, 2])
    ]
    made = batches_of(rows, batch_tokens=6)
    assert [(b.documents, b.inputs["x"][:, 0].tolist()) for b in made] == [
        (("0", "2"), [0.0, 2.0]),
        (("3",), [3.0]),
        (("1",), [1.0]),
        (("4",), [4.0]),
        (("5",), [5.0]),
    ]


def test_outputs_that_count() -> None:
    outputs = torch.tensor([[False, True, True]])
    batch = Batch({}, outputs=outputs)
    logits = torch.arange(6.0).reshape(1, 3, 2)
    assert batch.predicted(logits).tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert batch.counted(logits).shape == (3, 2), "as inputs of weights all positions count"
    assert batch.predicted(torch.zeros(2, 7)).shape == (2, 7), "another shape counts wholly"


@pytest.mark.parametrize("family", ["vit", "clip", "llava", "whisper"])
def test_the_walk_is_a_plain_forward_and_reaches_every_stack(
    family: str, places: dict[str, Path], tmp_path: Path
) -> None:
    source = Checkpoint.open(str(places[family]))
    structure = discover(source)
    model = FAMILIES[family].model_class.from_pretrained(places[family], dtype=torch.float32).eval()
    found = documents(str(write_rows(tmp_path, family, 8)))
    made = samples(model, load_processor(places[family], fed(model)), found, tokens=10**6, batch_tokens=60)
    again = samples(model, load_processor(places[family], fed(model)), found, tokens=10**6, batch_tokens=60)
    assert made.digest == again.digest and sorted(n for b in made.batches for n in b.documents) == sorted(
        document.name for document in found
    )
    outputs: dict[int, dict[str, torch.Tensor]] = {}
    reached = set()
    with torch.no_grad():
        walk = Walk(model, structure, made.batches, finish=lambda index, output: outputs.update({index: output}))
        for step in walk:
            reached.add(step.unit.module)
        plain = [model(**batch.inputs) for batch in made.batches]
    assert {block.module for stack in structure.stacks for block in stack.blocks} <= reached
    for index, expected in enumerate(plain):
        key = "logits" if "logits" in expected else "image_embeds"
        assert torch.equal(outputs[index][key], expected[key])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_data_that_cannot_feed_a_model() -> None:
    text, image, sound = Document("t", "x"), Document("i", image=b"x"), Document("s", audio=b"x")
    both = Document("b", "x", image=b"x")
    assert usable([text, image, both], frozenset({"image", "text"}), "d", "CLIPModel") == [both]
    assert usable([text, image, both], frozenset({"image"}), "d", "ViT") == [image, both]
    for kinds, found, sentence in (
        ({"image"}, [text], "No document of the data d holds an image, which M reads: give a folder of images"),
        ({"image", "text"}, [text, image], "holds an image and text, which M reads: give rows with 'image' and 'text'"),
        ({"audio", "text"}, [sound], "holds sound and text, which M reads: give rows with 'audio' and 'text'"),
        ({"text"}, [image], "holds text, which M reads: give text files"),
    ):
        with pytest.raises(InputError, match=sentence):
            usable(found, frozenset(kinds), "d", "M")


def test_a_processor_that_does_not_fit(places: dict[str, Path], tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil, LlavaProcessor, ViTImageProcessorPil

    image = Document("x", words(0, 3), image=str(write_image(tmp_path / "x.png", 1)))
    wrong = tmp_path / "vit"
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(wrong)
    model = make("vit").to("meta")
    with pytest.raises(InputError, match=r"does not take what its processor makes of x \(.*64"):
        Feed(model, load_processor(wrong, frozenset({"image"})), 64).row(image)
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    uncounted = LlavaProcessor(images, tokenizer({"<image>": 300}), patch_size=8, vision_feature_select_strategy="full")
    source = Checkpoint.open(str(places["llava"]))
    llava = skeleton(source.config, source.model_path, source.tensors)
    (tmp_path / "llava").mkdir()
    uncounted.num_additional_image_tokens = 3
    with pytest.raises(InputError, match=r"writes 19 image tokens into x, but the model makes 16"):
        Feed(llava, uncounted, 64).row(image)
    with pytest.raises(InputError, match=r"The processor does not take x \("):
        feed_of(places["llava"]).row(Document("x", "<image> <image> word1", image=image.image))


def test_no_processor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(InputError, match=r"The processor of .* does not load .*preprocessor_config\.json"):
        load_processor(tmp_path, frozenset({"image"}))


def test_a_sound_that_is_too_long(places: dict[str, Path], tmp_path: Path) -> None:
    path = write_sound(tmp_path / "x.wav", 1, SECONDS + 1)
    with pytest.raises(
        InputError, match=r"x takes 3\.0 seconds, more than the 2 that the model is fed at once: cut it"
    ):
        feed_of(places["whisper"]).row(Document("x", "word1", audio=str(path)))


def test_messages_without_a_template(places: dict[str, Path], tmp_path: Path) -> None:
    talk = Document(
        "x", messages=({"role": "user", "content": "word1"},), image=str(write_image(tmp_path / "x.png", 1))
    )
    with pytest.raises(InputError, match="x holds messages, but the model's processor has no chat template"):
        feed_of(places["clip"]).row(talk)
