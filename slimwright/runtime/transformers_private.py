"""Every private name of transformers that slimwright uses. Imported elsewhere from here only.

If one is gone, importing this module fails with one sentence that says which.
"""

from __future__ import annotations

import transformers

from slimwright.errors import SlimwrightError

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Concatenate,
        MergeModulelist,
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )
    from transformers.generation.utils import GENERATION_MODES_MAPPING
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass as BaseAutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.pytorch_utils import Conv1D

    decode_special_floats = transformers.PretrainedConfig._decode_special_floats
except (ImportError, AttributeError) as error:
    raise SlimwrightError(
        f"slimwright needs a name that transformers {transformers.__version__} does not have ({error}): install a "
        "version that `slimwright doctor` lists as tested."
    ) from error

__all__ = [
    "CONFIG_MAPPING",
    "GENERATION_MODES_MAPPING",
    "BaseAutoModel",
    "Concatenate",
    "Conv1D",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "decode_special_floats",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "modeling_auto",
    "rename_source_key",
]
