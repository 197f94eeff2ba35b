"""Peak anonymous memory of the stages on a random checkpoint, against the formula in docs/cost.md.

python benchmarks/memory.py make FOLDER             a checkpoint of Qwen2.5-1.5B's shape, shard by shard
python benchmarks/memory.py measure PROJECT STAGE   one stage in this process, sampled
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QWEN = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936, "hidden_size": 1536,
    "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
}  # fmt: skip


def make_checkpoint(folder: Path, config: dict[str, Any], *, shard: float = 1e9) -> None:
    """Random weights in the config's dtype and a tokenizer that knows bytes; never more than a shard in memory."""
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


def anonymous() -> int:
    """Bytes of this process that no file stands behind."""
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Sampler:
    """The highest of `anonymous`, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.base = self.peak = anonymous()
        self._done = threading.Event()

    def __enter__(self) -> "Sampler":
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.003):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure(root: Path, stage: str, part: str | None) -> dict[str, float | None]:
    """One stage: its peak above what imports hold, the formula's bound, and the wait for weights."""
    import torch

    from wanda_dvc.engine.decoder import Decoder
    from wanda_dvc.stages import STAGES
    from wanda_dvc.stages.apply import apply
    from wanda_dvc.stages.calibrate import calibrate
    from wanda_dvc.stages.mask import mask
    from wanda_dvc.stages.perplexity import perplexity
    from wanda_dvc.study.project import Project

    project = Project(root)
    torch.set_num_threads(project.params.runtime.threads or torch.get_num_threads())
    run: Any = {"calibrate": calibrate, "mask": mask, "apply": apply, "perplexity": perplexity}[stage]
    wanted = STAGES[stage].need(project, part)  # it imports the family's code, as it does before a stage
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
    with Sampler() as sampler:
        run(project=project, **({"model": part} if part else {}))
    seconds = time.perf_counter() - began
    return {
        "peak": sampler.peak - sampler.base,
        "imports": sampler.base,
        "bound": wanted.memory.anonymous if wanted.memory else 0,
        "seconds": seconds,
        "waited": waited,
    }


def main() -> None:
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
