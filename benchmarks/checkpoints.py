"""Random checkpoints of any shape, written shard by shard. It needs torch and transformers alone."""

import json
from pathlib import Path
from typing import Any

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
