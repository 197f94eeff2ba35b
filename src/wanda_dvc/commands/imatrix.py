"""llama.cpp's importance matrix of a pruned model: the statistics `norms`, by the names of a GGUF file."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wanda_dvc.engine.checkpoint import read_config
from wanda_dvc.errors import UserError
from wanda_dvc.plan import Plan
from wanda_dvc.study.artifact import block_count, digest, read_provenance
from wanda_dvc.study.folder import Study
from wanda_dvc.study.tensors import read_masks, read_stats

OTHER_NAMES = {  # of architectures; not granitemoehybrid: without experts, the converter leaves gguf's table
    "bamba": "granitehybrid", "cohere": "command-r", "deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2",
    "ernie4_5_moe": "ernie4_5-moe", "granitemoeshared": "granitemoe", "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe", "iquestcoder": "llama", "mistral": "llama", "mixtral": "llama", "olmo3": "olmo2",
    "phi": "phi2",
}  # fmt: skip
FUSED, GATE_AND_UP = "gate_up_proj", ("gate_proj", "up_proj")  # one tensor of a checkpoint, often two in GGUF
REORDERED = "linear_attn.out_proj"  # the converter changes the order of its inputs
Array = np.ndarray[Any, Any]


def write_imatrix(study: Study, target: Path) -> str:
    """Write the importance matrix of a study's pruned model; return a line about it.

    For each weight it has Σx² of each kept input, and the number of tokens, of the dense model on the calibration text.
    The experts of a block are rows of one tensor, [experts, in]. Format: llama.cpp #9400.
    """
    from gguf import GGUFWriter

    masks, stats = read_provenance(study.masks, "mask"), read_provenance(study.stats, "calibrate")
    if masks["stats"] != digest(stats):
        raise UserError("stats/norms: found another calibration than the masks have, expected theirs; run `dvc repro`")
    is_smaller, blocks = Plan.from_dict(masks["params"]).structure is not None, block_count(study.stats, "calibrate")
    arch, names_of = names_in_gguf(read_config(study.model("dense")).get_text_config().model_type, blocks)
    inputs = defaultdict[str, list[tuple[Array, int]]](list)  # by weight: one, or one of each expert
    for linear, squares, count in _kept_inputs(study, blocks, is_smaller=is_smaller):
        for name in names_of(linear):
            inputs[f"{name}.weight"].append((squares, count))

    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(target, arch)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [stats["text"]["source"]])
    writer.add_uint32("imatrix.chunk_count", stats["params"]["windows"])
    writer.add_uint32("imatrix.chunk_size", stats["params"]["length"])
    for name in sorted(inputs):
        counts = [count for _, count in inputs[name]]
        writer.add_tensor(f"{name}.in_sum2", np.stack([squares for squares, _ in inputs[name]]).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array(counts, np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return f"the importance matrix of {len(inputs)} weights, for `llama-quantize --imatrix`"


def _kept_inputs(study: Study, blocks: int, *, is_smaller: bool) -> Iterator[tuple[str, Array, int]]:
    """Yield the name of each linear of the pruned model, Σx² of its inputs, [in], and the number of their tokens."""
    pruned_block = 0
    for block in range(blocks):
        stats, masks = read_stats(study.stats, block), read_masks(study.masks, block)
        inputs_of = stats.by_linear
        kept = [linear for linear in masks if not is_smaller or masks[linear].any()]  # a removed expert has none
        for linear in kept:
            squares = inputs_of[linear].sum_squares
            if is_smaller:
                squares = squares[masks[linear].any(dim=1 if linear in stats.transposed else 0)]
            name = re.sub(r"\.\d+\.", f".{pruned_block}.", linear, count=1)
            yield name, squares.numpy(), inputs_of[linear].count
        if kept:
            pruned_block += 1


def names_in_gguf(model_type: str, blocks: int) -> tuple[str, Callable[[str], set[str]]]:
    """Return llama.cpp's name of a model type, and a function from a linear's name to those of its tensors in GGUF.

    The function returns no name for a linear that GGUF does not have, or has in another order.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    model_type = model_type.removesuffix("_text")
    spellings = {OTHER_NAMES.get(model_type, model_type), model_type.replace("_", ""), model_type.replace("_", "-")}
    archs = [arch for arch, name in MODEL_ARCH_NAMES.items() if name in spellings]
    if not archs:
        raise UserError(f"--imatrix: found {model_type}, expected a model with a known name in llama.cpp; leave it out")
    table = get_tensor_name_map(archs[0], blocks)

    def names_of(linear: str) -> set[str]:
        name = re.sub(r"experts\.\d+\.", "experts.", linear).replace("language_model.", "")
        stored = [name] if table.get_name(name) else [name.replace(FUSED, projection) for projection in GATE_AND_UP]
        names = {table.get_name(name) or "" for name in stored}
        return names if all(names) and REORDERED not in linear else set()

    return MODEL_ARCH_NAMES[archs[0]], names_of
