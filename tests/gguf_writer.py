"""Writes a Llama as a GGUF file, in the formats that the `gguf` package quantizes."""

import json
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from transformers import AutoConfig, AutoTokenizer

from wanda_dvc.engine.checkpoint import Address, Checkpoint


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write a Llama's matrices in a format, and its norms in float32."""
    config, checkpoint = AutoConfig.from_pretrained(folder), Checkpoint(folder)
    writer = GGUFWriter(path, "llama")
    _describe(writer, config)
    _add_tokenizer(writer, folder, config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name in checkpoint.file_of:
        values = checkpoint.read(Address(name)).to(torch.float32).numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # In llama.cpp's order: the two halves of each head alternate.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        stored = GGMLQuantizationType["F32" if values.ndim == 1 else kind]
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place, name
        writer.add_tensor(place, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    values = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps, "rope_freq_base": rope["rope_theta"],
        "rope_dimension_count": config.hidden_size // config.num_attention_heads, "vocab_size": config.vocab_size,
    }  # fmt: skip
    for name, value in (values | ({"rope_scaling_factor": rope["factor"]} if "factor" in rope else {})).items():
        getattr(writer, f"add_{name}")(value)


def _add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    named = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {one["id"] for one in stored["added_tokens"]}
    numbers = range(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([named.get(number, f"[PAD{number}]") for number in numbers])
    kinds = [TokenType.NORMAL if number in named else TokenType.UNUSED for number in numbers]
    for number in added:
        kinds[number] = TokenType.CONTROL
    writer.add_token_types(kinds)
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"])
    writer.add_token_merges(list(pairs))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (number := getattr(tokenizer, name)) is not None:
            getattr(writer, f"add_{name}")(number)
