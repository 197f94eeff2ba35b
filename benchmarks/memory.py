"""Measure the peak anonymous memory of the stages on a random checkpoint, against the formula in docs/cost.md.

python benchmarks/memory.py make FOLDER             write a checkpoint of Qwen2.5-1.5B's shape, shard by shard
python benchmarks/memory.py measure PROJECT STAGE   run one stage in this process and sample its memory
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wanda_dvc.stages import STAGES, run
from wanda_dvc.stages.running import AnonymousMemory
from wanda_dvc.study.project import Project

QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 1536,
    "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
}  # fmt: skip


def make_checkpoint(folder: Path, config: dict[str, Any], *, shard: float = 1e9) -> None:
    """Write random weights in the config's dtype and a tokenizer of bytes; one shard at a time is in memory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    dtype = getattr(torch, config["dtype"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    shards: list[list[tuple[str, Any]]] = [[]]
    size = 0
    for name, parameter in model.named_parameters():
        more = parameter.numel() * dtype.itemsize
        if size and size + more > shard:
            shards.append([])
            size = 0
        shards[-1].append((name, parameter.shape))
        size += more
    where: dict[str, str] = {}
    for number, content in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.ones(shape, dtype=dtype)
            if "norm" in name
            else torch.empty(shape, dtype=dtype).normal_(std=0.02)
            for name, shape in content
        }
        save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        del tensors
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<p>").save_pretrained(folder)


def measure(root: Path, stage: str, part: str | None) -> dict[str, float | None]:
    """Run one stage; return its peak above the imports' memory, the formula's bound, and the wait for weights."""
    import torch

    from wanda_dvc.engine.decoder import Decoder

    project = Project(root)
    torch.set_num_threads(project.params.runtime.threads or torch.get_num_threads())
    _ = STAGES[stage].function  # imported, so that the sampler counts what the run holds
    wanted = STAGES[stage].need(project, part)  # this imports the family's code, as it does before a stage
    waited = 0.0
    original = Decoder.block

    @contextmanager
    def watched(self: Decoder, index: int) -> Iterator[Any]:
        nonlocal waited
        began = time.perf_counter()
        entered = original(self, index)
        block = entered.__enter__()
        waited += time.perf_counter() - began
        try:
            yield block
        finally:
            entered.__exit__(None, None, None)

    Decoder.block = watched  # type: ignore[method-assign]
    began = time.perf_counter()
    with AnonymousMemory(samples_a_second=300) as sampler:
        run(stage, project=project, part=part)
    seconds = time.perf_counter() - began
    return {
        "peak": sampler.peak - sampler.base,
        "imports": sampler.base,
        "bound": wanted.memory.anonymous if wanted.memory else 0,
        "seconds": seconds,
        "waited": waited,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("folder", type=Path)
    make.add_argument("--config", type=json.loads, default={}, help="JSON: what differs from Qwen2.5-1.5B")
    make.add_argument("--shard", type=float, default=1e9, help="bytes")
    look = commands.add_parser("measure")
    look.add_argument("project", type=Path)
    look.add_argument("stage", choices=["calibrate", "mask", "apply", "perplexity"])
    look.add_argument("part", nargs="?")
    look.add_argument("--result", type=Path, required=True)
    words = parser.parse_args()
    if words.command == "make":
        make_checkpoint(words.folder, QWEN | words.config, shard=words.shard)
    else:
        words.result.write_text(json.dumps(measure(words.project, words.stage, words.part)))


if __name__ == "__main__":
    main()
