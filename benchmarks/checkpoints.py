"""Random checkpoints of any shape, written shard by shard. It needs torch and transformers alone."""

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "tests/configs"


def make_checkpoint(folder: Path, config: dict[str, Any], *, shard: float = 1e9) -> None:
    """Write random weights in the config's dtype and a tokenizer of bytes; one shard at a time is in memory."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    dtype = getattr(torch, config["dtype"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    split = split_torch_state_dict_into_shards(parameters, max_shard_size=int(shard))
    for file, names in split.filename_to_tensors.items():
        tensors = {name: torch.ones(parameters[name].shape, dtype=dtype) for name in names}
        for name in names:
            if "norm" not in name:
                tensors[name].normal_(std=0.02)
        save_file(tensors, folder / file, {"format": "pt"})
        del tensors
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<p>")
