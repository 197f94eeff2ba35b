"""Names that the engine uses, and that the libraries do not promise: each is where the engine looks for it.

An upgrade that moves one fails here, with its name, and not in a run.
"""

import ast
import inspect
from importlib import import_module

import pytest
import torch
from conftest import ROOT

NAMES = [
    # transformers: stored names, masks, attention, experts
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.core_model_loading:WeightConverter.convert",
    "transformers.core_model_loading:WeightConverter.add_tensor",
    "transformers.core_model_loading:WeightRenaming",
    "transformers.core_model_loading:dot_natural_key",
    "transformers.core_model_loading:rename_source_key",
    "transformers.core_model_loading:revert_weight_conversion",
    "transformers.initialization:no_init_weights",
    "transformers.masking_utils:sdpa_mask",
    "transformers.models.auto.modeling_auto:MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "transformers.pytorch_utils:Conv1D",
    "transformers.utils:output_capturing",
    "transformers:AttentionInterface.register",
    "transformers:AttentionMaskInterface.register",
    "transformers:PreTrainedModel.set_attn_implementation",
    "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected",
    # torch: oneDNN's products, and what a CPU multiplies natively
    "torch:ops.mkldnn._is_mkldnn_bf16_supported",
    "torch:ops.mkldnn._is_mkldnn_fp16_supported",
    "torch:ops.mkldnn._linear_pointwise",
    "torch:cpu._is_amx_tile_supported",
    "torch:cpu._is_avx512_supported",
    "torch:nn.Module._parameters",
    "torch:nn.Module._buffers",
    "torch.utils._pytree:tree_flatten",
    "torch.overrides:TorchFunctionMode",
    # lm-eval: tasks and models
    "lm_eval.api.task:ConfigurableTask",
    "lm_eval.evaluator:evaluate",
    "lm_eval.models.huggingface:HFLM",
    "lm_eval.tasks._index:Entry",
    "lm_eval.tasks._index:TaskIndex",
    "lm_eval.tasks._yaml_loader:load_yaml",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_release_has_the_name(name: str):
    module, _, path = name.partition(":")
    found = import_module(module)
    for part in path.split("."):
        found = torch.nn.Module().__dict__[part] if part in ("_parameters", "_buffers") else getattr(found, part)


def test_each_import_from_inside_a_library_is_listed():
    imported = set()
    for path in (ROOT / "src/wanda_dvc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("transformers.", "lm_eval.")):
                imported |= {f"{node.module}:{alias.name}" for alias in node.names}
    assert imported - {name.partition(".convert")[0].partition(".add_tensor")[0] for name in NAMES} == set()


def test_the_functions_take_what_the_engine_gives():
    from transformers.core_model_loading import WeightConverter, rename_source_key
    from transformers.masking_utils import sdpa_mask

    inspect.signature(rename_source_key).bind("name", [], [], "model", {})
    inspect.signature(WeightConverter.convert).bind(None, "name", model=None, config=None)
    inspect.signature(WeightConverter.add_tensor).bind(None, "target", "source", "pattern", torch.ones(1))
    inspect.signature(sdpa_mask).bind(1, 2, 2, mask_function=None, device="cpu", allow_is_causal_skip=False)
