"""The bundled model's training script: what it would make is what is shipped."""

from transformers import AutoTokenizer

from slimwright.zoo import bundled_path
from slimwright.zoo.text import standard_library
from slimwright.zoo.tokens import VOCABULARY
from slimwright.zoo.train_bundled import configuration


def test_the_configuration_is_that_of_the_bundled_model() -> None:
    shipped = configuration(0).from_pretrained(bundled_path()).to_dict()
    named = configuration(0).to_dict()
    changed = {key for key in named if named[key] != shipped.get(key)}
    assert changed <= {"architectures", "dtype", "transformers_version"}


def test_the_tokenizer_was_trained_on_code_of_this_kind() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    assert len(tokenizer) == VOCABULARY
    text = "".join(document.text for document in standard_library("heldout")[:10])
    assert len(text.encode()) / len(tokenizer.encode(text, verbose=False)) > 3
