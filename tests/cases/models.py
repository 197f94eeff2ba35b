"""Model directories that `download model` must refuse."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cases import REMOVED, Case, dotted, removed, replaced_by_folder, replaced_by_link, replaced_by_pipe, written

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def config(**changes: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            stored = dotted(stored, name, value)
        (folder / "config.json").write_text(json.dumps(stored))

    return spoil


def entry(name: str, **changes: object) -> Callable[[Path], object]:
    """Change what the header of the one shard says of a tensor; its data stay."""

    def spoil(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        entries[name].update(changes)
        new = json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])

    return spoil


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the tensors themselves, and write them as a whole file."""

    def spoil(folder: Path) -> None:
        loaded = load_file(folder / SINGLE)
        change(loaded)
        save_file(loaded, folder / SINGLE, {"format": "pt"})

    return spoil


def stored_as(name: str, dtype: torch.dtype) -> Callable[[Path], object]:
    return tensors(lambda loaded: loaded.update({name: loaded[name].to(dtype)}))


def index(weight_map: object, **more: object) -> Callable[[Path], object]:
    """An index beside a shard of another name. `ALL` stands for every tensor of it."""

    def spoil(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        names = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        names.pop("__metadata__", None)
        (folder / SINGLE).rename(folder / "a.safetensors")
        shards = dict.fromkeys(names, "a.safetensors")
        content_of_map = shards | weight_map if isinstance(weight_map, dict) and weight_map else weight_map
        document = {"weight_map": content_of_map} if weight_map is not REMOVED else {}
        (folder / INDEX).write_text(json.dumps(document | more))

    return spoil


def cut(name: str, keep: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(keep((folder / name).read_bytes()))


def cases() -> Iterator[Case]:
    for name in ("config.json", SINGLE):
        yield Case(f"{name}: a folder", replaced_by_folder(name), (name, "not a file", "expected a file"))
        yield Case(f"{name}: a dangling link", replaced_by_link(name), (name, "a link to a missing file"))
    yield Case(f"{SINGLE}: a pipe", replaced_by_pipe(SINGLE), (SINGLE, "not a file", "expected a file"))
    yield Case("tokenizer.json: a folder", replaced_by_folder("tokenizer.json"), ("no tokenizer", "copy one there"))
    for setting, wrong, says in CONFIGS:
        name = f"config.json: {setting} {'' if wrong is REMOVED else wrong!r:.40}"
        yield Case(name, config(**{setting: wrong}), says)
    for weight_map, found in ((REMOVED, "found None"), ([], "found []"), ({}, "found {}")):
        says = (INDEX, f"weight_map: {found}", "expected names of files")
        yield Case(f"index: weight_map {found}", index(weight_map), says)
    for shard in (3, None, "../../../etc/passwd", "/etc/passwd", "..", "", "a\\b", "a\0b", "sub/a.safetensors"):
        says = (f"found {shard!r}", "names of files in this folder")
        yield Case(f"index: shard {shard!r}", index({QUERY: shard}), says)
    for name, spoil in DAMAGED.items():
        yield Case(f"shard: {name}", spoil, (SINGLE, "damaged", "expected a safetensors file"))
    for kind, dtype in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        yield Case(f"shard: {dtype}", stored_as(QUERY, kind), (f"{QUERY} is {dtype}", "expected F32, F16, BF16"))
    for name, (spoil, *words) in OTHERS.items():
        yield Case(name, spoil, tuple(words))


# A setting of config.json, its wrong value, and what the message says.
CONFIGS: list[tuple[str, object, tuple[str, ...]]] = [
    ("num_hidden_layers", True, ("config.json", "expected int, got bool", "expected a configuration")),
    ("num_hidden_layers", 5, ("no tensor for model.layers.4", "which config.json asks for")),
    ("num_hidden_layers", 3, ("has 3 blocks", "expected 4 or more", "model.layers.3")),
    ("hidden_size", 36, ("is [260, 32]", "expected [260, 36]")),
    ("head_dim", 0, ("config.json", "transformers builds no llama", "expected sizes")),
    ("rope_parameters", {"rope_type": "nope"}, ("config.json", "KeyError 'nope'", "expected")),
    ("tie_word_embeddings", False, ("no tensor for lm_head.weight", "which config.json asks for")),
    ("model_type", REMOVED, ("config.json", "found no model_type", "expected a causal decoder")),
    ("model_type", "t5", ("config.json", "found t5", "expected a causal decoder")),
    ("quantization_config", {"quant_method": "fp8"}, ("quantized by", "expected unquantized ones")),
]
DAMAGED: dict[str, Callable[[Path], object]] = {
    "a huge header": written(SINGLE, b"\xff" * 64),
    "one byte short": cut(SINGLE, lambda data: data[:-1]),
    "overlapping tensors": entry(QUERY, data_offsets=[0, 4096]),
}
OTHERS: dict[str, Any] = {
    "no config": (removed("config.json"), "no config.json", "expected a Hugging Face model"),
    "a family's name for code of its own": (
        config(architectures=["NewForCausalLM"], auto_map={"AutoModelForCausalLM": "new.NewForCausalLM"}),
        "config.json",
        "found ['NewForCausalLM']",
        "a model's own code is never run",
        "expected LlamaForCausalLM",
    ),
    "no weights": (removed(SINGLE), "found", "no model.safetensors"),
    "no tokenizer": (removed("tokenizer.json"), "no tokenizer", "tokenizer.json"),
    "config.json: half": (written("config.json", '{"a": '), "config.json", "found no JSON", "expected"),
    "index: half": (written(INDEX, '{"a": '), INDEX, "found no JSON"),
    "index: a shard that is not there": (index({QUERY: "b.safetensors"}), "b.safetensors: missing"),
    "shard: another shape": (entry(QUERY, shape=[16, 64]), QUERY, "is [16, 64]", "expected [32, 32]"),
    "shard: a tensor missing": (tensors(lambda t: t.pop(QUERY)), f"no tensor for {QUERY}", "copy the checkpoint"),
    "shard: embeddings missing": (tensors(lambda t: t.pop(HEAD)), "no tensor for", "copy the checkpoint"),
    "tokenizer.json: half": (written("tokenizer.json", '{"a": '), "the tokenizer does not load", "copy tokenizer.json"),
}
