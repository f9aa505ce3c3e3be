"""Images and sounds of documents, decoded."""

from __future__ import annotations

import io
import math
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np

from slimwright.calibrate.data import Document, medium_bytes
from slimwright.errors import InputError


def require_pillow() -> None:
    """InputError, with the command that installs it, if the package that reads images is not there."""
    if find_spec("PIL") is None:
        raise InputError("Reading images needs Pillow: pip install pillow.")


def read_image(document: Document, mode: str = "RGB") -> Any:
    """A document's image as a ``PIL.Image`` of a mode, decoded whole.

    Raises:
        InputError: it has none, it is damaged, or Pillow is not installed or does not know its format.
    """
    require_pillow()
    from PIL import Image

    if document.image is None:
        raise InputError(f"{document.name} has no image.")
    try:
        with Image.open(io.BytesIO(medium_bytes(document.image, document.name))) as found:
            return found.convert(mode)
    except InputError:
        raise
    except Exception as error:  # damaged images fail in as many ways as there are formats
        raise InputError(f"The image {_whose(document, document.image)} cannot be read ({_reason(error)}).") from None


def read_sound(document: Document, rate: int) -> np.ndarray:
    """A document's sound: (samples,) float32 in -1..1, channels averaged, resampled to ``rate`` per second.

    WAV files of integers or floats are read.

    Raises:
        InputError: it has none, or it is no WAV file, damaged, empty, or holds NaN or Inf.
    """
    import scipy.io.wavfile
    import scipy.signal

    if document.audio is None:
        raise InputError(f"{document.name} has no sound.")
    whose = _whose(document, document.audio)
    content = medium_bytes(document.audio, document.name)
    if content[:4] not in (b"RIFF", b"RIFX", b"RF64"):
        raise InputError(f"The sound {whose} is no WAV file: convert it, for instance with `ffmpeg -i IN OUT.wav`.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.io.wavfile.WavFileWarning)  # chunks that are no sound
            own_rate, samples = scipy.io.wavfile.read(io.BytesIO(content))
    except Exception as error:  # damaged files fail in many ways
        raise InputError(f"The sound {whose} cannot be read ({_reason(error)}).") from None
    if not samples.size or own_rate < 1:
        raise InputError(f"The sound {whose} is empty.")
    if samples.dtype == np.uint8:  # 8 bits are stored unsigned, all else signed
        wave = (samples.astype(np.float64) - 128) / 128
    elif samples.dtype.kind == "i":
        wave = samples / -float(np.iinfo(samples.dtype).min)
    else:
        wave = samples.astype(np.float64)
    if wave.ndim == 2:
        wave = wave.mean(1)
    if not np.isfinite(wave).all():
        raise InputError(f"The sound {whose} holds NaN or Inf.")
    if own_rate != rate:
        shared = math.gcd(own_rate, rate)
        wave = scipy.signal.resample_poly(wave, rate // shared, own_rate // shared)
    return wave.astype(np.float32)


def _whose(document: Document, medium: str | bytes) -> str:
    """The file, or what it is a part of."""
    return medium if isinstance(medium, str) else f"of {document.name}"


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
