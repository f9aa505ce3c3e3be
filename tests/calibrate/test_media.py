"""Images and sounds: what is read of folders and tables, what is decoded of it, what is refused in one sentence."""

from __future__ import annotations

import io
import json
import struct
import wave
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow, which reads images, is not installed")
from PIL import Image

from slimwright.calibrate.data import Document, documents, split
from slimwright.calibrate.media import read_image, read_sound
from slimwright.errors import InputError
from tests.media import write_image, write_rows, write_sound


def test_a_folder_of_images_and_sounds(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", 1)
    (tmp_path / "sub").mkdir()
    write_image(tmp_path / "sub" / "a.JPG", 2)
    write_sound(tmp_path / "c.wav", 3)
    (tmp_path / "c.txt").write_text("what is said\n")
    (tmp_path / "notes.md").write_text("a text of its own")
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2")
    found = {document.name: document for document in documents(str(tmp_path))}
    assert list(found) == ["b.png", "c.wav", "notes.md", "sub/a.JPG"]
    assert found["b.png"].image == str(tmp_path / "b.png") and found["b.png"].text == ""
    assert found["c.wav"].audio == str(tmp_path / "c.wav") and found["c.wav"].text == "what is said"
    assert found["notes.md"].text == "a text of its own"


def test_files_that_rows_name_belong_to_the_rows(tmp_path: Path) -> None:
    write_rows(tmp_path, "clip", 5, label=lambda index: "cat")
    write_image(tmp_path / "loose.png", 99)
    found = documents(str(tmp_path))
    assert [document.name for document in found] == ["loose.png", *(f"rows.jsonl:{i}" for i in range(1, 6))]
    assert all(document.text and document.label == "cat" for document in found[1:])


def test_bytes_in_parquet_equal_the_file(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow, which reads parquet, is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = write_image(tmp_path / "x.png", 1).read_bytes()
    rows = [{"image": {"bytes": content, "path": None}, "text": "one"}, {"image": {"bytes": content, "path": None}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second = documents(str(tmp_path / "rows.parquet"))
    assert first.image == content and first.text == "one" and second.text == ""
    assert second.digest == Document("elsewhere", image=str(tmp_path / "x.png")).digest, "by content"
    assert first.digest != second.digest


def test_a_dataset_keeps_its_media_encoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    paths = [str(write_image(tmp_path / f"{i}.png", i)) for i in range(3)]
    made = datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 2]}).cast_column("image", datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    found = documents(str(tmp_path / "saved"))
    assert [document.label for document in found] == [0, 1, 2]
    for document, path in zip(found, paths):
        assert np.array_equal(np.asarray(read_image(document)), np.asarray(Image.open(path)))


def test_the_digest_follows_the_files_content(tmp_path: Path) -> None:
    path = write_image(tmp_path / "x.png", 1)
    first = Document("x", image=str(path)).digest
    assert Document("x", image=str(path)).digest == first
    write_image(path, 2)
    assert Document("x", image=str(path)).digest != first


@pytest.mark.parametrize("count", [2, 3, 4, 9, 30, 400])
def test_a_tenth_is_kept_and_two_where_there_are_four(count: int) -> None:
    found = [Document(str(i), f"text {i}") for i in range(count)]
    solvers, kept = split([*found, *found])
    assert len(solvers) + len(kept) == 2 * count and not {d.text for d in solvers} & {d.text for d in kept}
    distinct = {document.text for document in kept}
    assert len(distinct) >= (2 if count >= 4 else 1) and solvers
    by_hash = {document.text for document in found if document.digest[0] % 10 == 0}
    assert by_hash <= distinct or len(by_hash) == count
    assert count < 400 or 20 <= len(distinct) <= 65


# -- decoding ------------------------------------------------------------------------------------------------------


def test_images_in_other_modes_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for name, made in (("l.png", grey), ("p.gif", grey.convert("P")), ("a.png", grey.convert("RGBA"))):
        made.save(tmp_path / name)
        found = np.asarray(read_image(Document(name, image=str(tmp_path / name))))
        assert found.shape == (8, 8, 3) and np.array_equal(found[..., 0], np.asarray(grey))
    assert read_image(Document("l", image=str(tmp_path / "l.png")), "L").mode == "L"


def encoded(samples: np.ndarray, width: int, rate: int) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        if width == 3:
            file.writeframes(b"".join(int(x).to_bytes(3, "little", signed=True) for x in samples.reshape(-1)))
        else:
            file.writeframes(samples.astype({1: "u1", 2: "<i2", 4: "<i4"}[width]).tobytes())
    return out.getvalue()


@pytest.mark.parametrize(
    ("width", "full", "middle"), [(1, 128, 128), (2, 1 << 15, 0), (3, 1 << 23, 0), (4, 1 << 31, 0)]
)
def test_integers_of_all_widths(width: int, full: int, middle: int) -> None:
    samples = np.array([[0.0, 0.5], [-0.5, -0.5], [0.25, -0.75], [-1.0, 0.5]])
    content = encoded(np.round(samples * full) + middle, width, 8000)
    found = read_sound(Document("x", audio=content), 8000)
    assert found.dtype == np.float32 and np.allclose(found, samples.mean(1), atol=2 / full)


def test_floats() -> None:
    samples = np.array([0.0, 0.5, -0.25], "<f4")
    head = struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32)
    body = b"fmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", 12) + samples.tobytes()
    content = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body
    assert np.array_equal(read_sound(Document("x", audio=content), 8000), samples)
    broken = content.replace(samples[1].tobytes(), np.float32("nan").tobytes())
    with pytest.raises(InputError, match="x holds NaN or Inf"):
        read_sound(Document("x", audio=broken), 8000)


@pytest.mark.parametrize(("own", "wanted"), [(44100, 16000), (8000, 16000), (16000, 11025)])
def test_a_tone_keeps_its_pitch_when_it_is_resampled(own: int, wanted: int) -> None:
    def tone(rate: int) -> np.ndarray:
        return 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)

    found = read_sound(Document("x", audio=encoded(np.round(tone(own)[:, None] * (1 << 15)), 2, own)), wanted)
    assert found.shape == (wanted,)
    assert np.abs(found - tone(wanted))[200:-200].max() < 2e-3


# -- refusals ------------------------------------------------------------------------------------------------------


def refused(match: str, call: object, *arguments: object) -> None:
    with pytest.raises(InputError, match=match) as error:
        call(*arguments)  # type: ignore[operator]
    assert len(str(error.value).splitlines()) == 1


def test_damaged_files_are_named(tmp_path: Path) -> None:
    image = write_image(tmp_path / "x.png", 1)
    image.write_bytes(image.read_bytes()[:200])
    refused(r"The image .*x\.png cannot be read", read_image, Document("x", image=str(image)))
    refused("The image of row cannot be read", read_image, Document("row", image=b"no image at all"))
    sound = write_sound(tmp_path / "x.wav", 1)
    content = sound.read_bytes()
    sound.write_bytes(content[:30])
    refused(r"The sound .*x\.wav cannot be read", read_sound, Document("x", audio=str(sound)), 8000)
    refused("is empty", read_sound, Document("x", audio=encoded(np.zeros((0, 1)), 2, 8000)), 8000)
    refused("is no WAV file: convert it", read_sound, Document("x", audio=b"ID3 an mp3"), 8000)
    gone = tmp_path / "gone.png"
    refused(r"gone\.png of x cannot be read: No such file", read_image, Document("x", image=str(gone)))


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"image": "absent.png"}, r"rows\.jsonl, line 1, names the image 'absent.png', which is not there"),
        ({"audio": "absent.wav", "text": "x"}, "names the audio 'absent.wav', which is not there"),
        ({"image": 3}, "line 1, has an 'image' that is no path"),
        ({"picture": "x.png"}, r"line 1, has the columns \['picture'\]; it needs .*'image' or 'audio'"),
    ],
)
def test_bad_rows(row: dict[str, object], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    refused(sentence, documents, str(tmp_path / "rows.jsonl"))
