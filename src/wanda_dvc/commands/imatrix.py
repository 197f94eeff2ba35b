"""llama.cpp's importance matrix of a pruned model: the norm tier, by the names of a GGUF file."""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from wanda_dvc.engine.checkpoint import read_config
from wanda_dvc.errors import UserError, shortened
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
FUSED = ("gate_up_proj", "gate_proj", "up_proj")  # the first is one tensor of a checkpoint, and often two in GGUF
REORDERED = "linear_attn.out_proj"  # the converter changes the order of its inputs


def importance(study: Study, target: Path) -> str:
    """Write the importance matrix of a study's pruned model; return a line about it.

    It has Σx² and the number of tokens for each input of each weight, of the dense model on the calibration text,
    without inputs that went. Experts are merged, as [experts, in]. Format: llama.cpp #9400.
    """
    from gguf import GGUFWriter

    masks, measured = read_provenance(study.masks, "mask"), read_provenance(study.stats, "calibrate")
    if masks["stats"] != digest(measured):
        raise UserError("stats/norms: found another calibration than the masks have, expected theirs; run `dvc repro`")
    smaller, blocks, block = bool(Plan.read(masks["params"]).structure), block_count(study.stats, "calibrate"), 0
    arch, named = names_in_gguf(read_config(study.model("dense")).get_text_config().model_type, blocks)
    found, left_out = defaultdict(list), set[str]()
    for before in range(blocks):
        stats, keeps = read_stats(study.stats, before), read_masks(study.masks, before)
        read = stats.by_linear
        for linear, keep in keeps.items():
            if smaller and not keep.any():  # of an expert or a block that went
                continue
            inputs = keep.any(dim=1 if linear in stats.transposed else 0) | (not smaller)
            name = re.sub(r"\.\d+\.", f".{block}.", linear, count=1)
            if not (names := named(name)):
                left_out.add(name)
            for one in names:
                found[f"{one}.weight"].append((read[linear].sum_squares[inputs].numpy(), read[linear].count))
        block += not smaller or any(keep.any() for keep in keeps.values())
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(target, arch)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [measured["text"]["source"]])
    writer.add_uint32("imatrix.chunk_count", measured["params"]["windows"])
    writer.add_uint32("imatrix.chunk_size", measured["params"]["length"])
    for name, rows in sorted(found.items()):
        writer.add_tensor(f"{name}.in_sum2", np.stack([sums for sums, _ in rows]).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[count] for _, count in rows], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    without = f", without {shortened(sorted(left_out))}" if left_out else ""
    return f"the importance matrix of {len(found)} weights{without}, for `llama-quantize --imatrix`"


def names_in_gguf(kind: str, blocks: int) -> tuple[str, Callable[[str], set[str]]]:
    """Return llama.cpp's name of a model type, and a function from a linear's name to those of its tensors in GGUF."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kind = kind.removesuffix("_text")
    spelled = {OTHER_NAMES.get(kind, kind), kind.replace("_", ""), kind.replace("_", "-")}
    if not (known := [arch for arch, name in MODEL_ARCH_NAMES.items() if name in spelled]):
        raise UserError(f"--imatrix: found {kind}, expected a model with a known name in llama.cpp; leave it out")
    table = get_tensor_name_map(known[0], blocks)

    def names(linear: str) -> set[str]:
        name = re.sub(r"experts\.\d+\.", "experts.", linear).replace("language_model.", "")
        every = [table.get_name(name) or table.get_name(name.replace(FUSED[0], part)) for part in FUSED[1:]]
        return set() if REORDERED in name or None in every else set(filter(None, every))

    return MODEL_ARCH_NAMES[known[0]], names
