"""Model directories that `download model` must refuse."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cases import (
    NO_OBJECTS,
    REMOVED,
    Case,
    dotted,
    removed,
    replaced_by_folder,
    replaced_by_link,
    replaced_by_pipe,
    written,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUERY, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"


def config(**changes: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            stored = dotted(stored, name, value)
        (folder / "config.json").write_text(json.dumps(stored))

    return spoil


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the header of the one shard; its data stay."""

    def spoil(folder: Path) -> None:
        content = (folder / SINGLE).read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        entries = change(entries) or entries
        new = json.dumps(entries).encode()
        (folder / SINGLE).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])

    return spoil


def entry(name: str, **changes: object) -> Callable[[Path], object]:
    return header(lambda entries: entries[name].update(changes))


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change the tensors themselves, and write them as a whole file."""

    def spoil(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        loaded = load_file(folder / SINGLE)
        change(loaded)
        save_file(loaded, folder / SINGLE, {"format": "pt"})

    return spoil


def stored_as(name: str, dtype: str) -> Callable[[Path], object]:
    def change(loaded: dict[str, Any]) -> None:
        import torch

        loaded[name] = loaded[name].to(getattr(torch, dtype))

    return tensors(change)


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


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        change(stored)
        (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")

    return spoil


def cases() -> Iterator[Case]:
    yield from _files()
    yield from _configs()
    yield from _indexes()
    yield from _shards()
    yield from _tokenizers()


def _files() -> Iterator[Case]:
    for name in ("config.json", SINGLE, "tokenizer.json", "tokenizer_config.json"):
        yield Case(f"{name}: a folder", replaced_by_folder(name), (name, "found a folder", "expected a file"))
        yield Case(f"{name}: a pipe", replaced_by_pipe(name), (name, "found a pipe", "expected a file"))
        yield Case(f"{name}: a dangling link", replaced_by_link(name), (name, "a link to nowhere", "missing"))
        yield Case(f"{name}: a link to itself", replaced_by_link(name, name), (name, "symbolic links", "expected"))
    for name in ("vocab.json", "generation_config.json", "LICENSE", "chat_template.jinja", "merges.txt"):
        yield Case(f"{name}: a folder", replaced_by_folder(name), (name, "found a folder", "expected a file"))
        yield Case(f"{name}: a dangling link", replaced_by_link(name), (name, "a link to nowhere", "missing"))
        yield Case(f"{name}: a pipe", replaced_by_pipe(name), (name, "found a pipe", "expected a file"))
    yield Case("no config", removed("config.json"), ("no config.json", "expected a Hugging Face model"))
    yield Case("no weights", removed(SINGLE), ("found", "expected model.safetensors"))
    yield Case("no tokenizer", removed("tokenizer.json"), ("no tokenizer", "tokenizer.json"))


def _configs() -> Iterator[Case]:
    for name, (content, found) in NO_OBJECTS.items():
        yield Case(f"config.json: {name}", written("config.json", content), ("config.json", found, "expected"))
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        for value in ("32", -1, 0, 3.5, True, {"a": 1}, [0]):
            yield Case(
                f"config.json: {key} {value!r}",
                config(**{key: value}),
                (key, "found", "expected a positive whole number"),
            )
    one_of_many: list[tuple[str, object, tuple[str, ...]]] = [
        ("num_hidden_layers", 10**9, ("num_hidden_layers", "found 1000000000", "expected at most 10,000")),
        ("num_hidden_layers", 5000, ("num_hidden_layers", "found 5000", "expected at most")),
        ("num_hidden_layers", 5, ("no tensor for model.layers.4", "expected one by config.json")),
        ("num_hidden_layers", 3, ("has 3 blocks", "expected 4 or more", "model.layers.3")),
        ("hidden_size", 36, ("is [260, 32]", "expected [260, 36]")),
        ("hidden_size", 33, ("config.json", "multiple of the number of attention heads", "expected")),
        ("hidden_size", None, ("config.json", "hidden_size", "expected")),
        ("num_attention_heads", 3, ("config.json", "expected")),
        ("num_key_value_heads", 3, ("num_key_value_heads", "found 3", "expected a divisor of 4")),
        ("head_dim", 0, ("head_dim", "found 0", "expected a positive whole number")),
        ("head_dim", 16, ("expected", "by config.json")),
        ("intermediate_size", 64, ("expected", "by config.json")),
        ("intermediate_size", 10**12, ("config.json", "expected at most 134,217,728")),
        ("vocab_size", 10**13, ("config.json", "expected at most 134,217,728")),
        ("hidden_size", 2**60, ("config.json", "hidden_size: found", "expected at most 134,217,728")),
        ("vocab_size", 2**27 + 1, ("config.json", "expected at most 134,217,728")),
        ("vocab_size", 261, ("is [260, 32]", "expected [261, 32]")),
        ("hidden_act", "nope", ("config.json", "KeyError 'nope'", "expected")),
        ("hidden_act", 3, ("config.json", "hidden_act", "expected")),
        ("rope_parameters", {"rope_type": "nope"}, ("config.json", "KeyError 'nope'", "expected")),
        ("rope_parameters", {"rope_type": "linear"}, ("config.json", "rope_parameters", "expected")),
        ("rope_parameters", 3, ("config.json", "rope_parameters", "expected")),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}, ("config.json", "expected")),
        ("rope_parameters", {"rope_type": "linear", "factor": -1.0}, ("factor", "found -1.0", "expected a positive")),
        ("rope_parameters", {"rope_type": "linear", "factor": "x"}, ("factor", "found text", "expected a positive")),
        ("rope_scaling", {"type": "linear", "factor": 0}, ("rope_scaling.factor", "found 0", "expected a positive")),
        ("dtype", "float99", ("dtype", "found text (float99)", "expected float32, float16, bfloat16")),
        ("dtype", "int8", ("dtype", "found text (int8)", "expected float32, float16, bfloat16")),
        ("dtype", 3, ("dtype", "found 3", "expected float32, float16, bfloat16")),
        ("torch_dtype", "float8_e4m3fn", ("torch_dtype", "found text (float8_e4m3fn)", "expected float32")),
        ("max_position_embeddings", -1, ("max_position_embeddings", "found -1", "expected a positive whole number")),
        ("rms_norm_eps", "x", ("config.json", "rms_norm_eps", "expected")),
        ("tie_word_embeddings", "yes", ("config.json", "tie_word_embeddings", "expected")),
        ("tie_word_embeddings", False, ("no tensor for lm_head.weight", "expected one by config.json")),
        ("pad_token_id", 1000, ("config.json", "expected")),
        ("eos_token_id", "x", ("config.json", "eos_token_id", "expected")),
        ("layer_types", ["x"] * 4, ("config.json", "layer_types", "expected")),
        ("architectures", "Llama", ("config.json", "architectures is text", "expected a list of names")),
        ("architectures", [3], ("config.json", "architectures is a list", "expected a list of names")),
        ("model_type", REMOVED, ("config.json", "no model_type", "expected that of a causal decoder")),
        ("model_type", 3, ("config.json", "model_type is a number", "expected that of a causal decoder")),
        ("model_type", ["llama"], ("config.json", "model_type is a list", "expected that of a causal decoder")),
        ("model_type", "t5", ("config.json", "found t5", "expected a causal decoder")),
        ("model_type", "never-heard-of", ("config.json", "found never-heard-of", "expected a causal decoder")),
        ("model_type", "../../x", ("config.json", "found ../../x", "expected a causal decoder")),
        ("quantization_config", {"quant_method": "fp8"}, ("quantized by fp8", "expected unquantized ones")),
        ("text_config", {"hidden_size": -1}, ("text_config.hidden_size", "found -1", "expected a positive")),
    ]
    for setting, wrong, says in one_of_many:
        shown = "missing" if wrong is REMOVED else f"{wrong!r:.40}"
        yield Case(f"config.json: {setting} {shown}", config(**{setting: wrong}), says)


def _indexes() -> Iterator[Case]:
    for name, (content, found) in NO_OBJECTS.items():
        yield Case(f"index: {name}", written(INDEX, content), (INDEX, found))
    for weight_map, found in (
        (REMOVED, "found none"), ([], "found a list"), (3, "found a number"), ("a", "found text"),
        ({}, "found no tensors"),
        (True, "found true or false"), (["a.safetensors"], "found a list"),
    ):  # fmt: skip
        shown = "missing" if weight_map is REMOVED else repr(weight_map)
        yield Case(
            f"index: weight_map {shown}",
            index(weight_map),
            (INDEX, f"weight_map: {found}", "expected the file of each"),
        )
    for shard in (3, None, ["a.safetensors"], {"a": 1}, True):
        yield Case(
            f"index: shard {shard!r}",
            index({QUERY: shard}),
            (f"weight_map: {QUERY}", "found", "expected the name of a file"),
        )
    for outside in (
        "../../../etc/passwd", "/etc/passwd", "a/../a.safetensors", "./a.safetensors", "..", ".", "", "a\\b", "a\0b",
        "sub/a.safetensors", "a\nb", "x" * 300,
    ):  # fmt: skip
        yield Case(
            f"index: shard {outside[:30]!r}",
            index({QUERY: outside}),
            (QUERY, "found", "expected the name of a file in this folder"),
        )
    yield Case("index: a shard that is not there", index({QUERY: "b.safetensors"}), ("names b.safetensors", "missing"))
    yield Case(
        "index: a tensor that its shard lacks",
        index({"more": "a.safetensors"}),
        ("a.safetensors holds more", "does not"),
    )
    yield Case(
        "index: a shard that is a folder", _after(index({QUERY: "b"}), replaced_by_folder("b")), ("found a folder",)
    )
    yield Case("index: a shard that is a pipe", _after(index({QUERY: "b"}), replaced_by_pipe("b")), ("found a pipe",))
    yield Case(
        "index: a shard that is text", _after(index({QUERY: "b"}), written("b", "hello")), ("found 5 bytes", "expected")
    )


def _after(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        for one in spoils:
            one(folder)

    return spoil


def _shards() -> Iterator[Case]:
    whole = "incomplete safetensors file"
    yield Case("shard: empty", written(SINGLE, b""), (SINGLE, whole, "found 0 bytes", "expected"))
    yield Case("shard: seven bytes", written(SINGLE, b"1234567"), (SINGLE, whole, "found 7 bytes", "expected"))
    yield Case("shard: a huge header", written(SINGLE, b"\xff" * 64), (SINGLE, whole, "expected header and data"))
    yield Case("shard: one byte short", cut(SINGLE, lambda data: data[:-1]), (SINGLE, whole, "expected"))
    yield Case("shard: one byte long", cut(SINGLE, lambda data: data + b"x"), (SINGLE, whole, "expected"))
    yield Case("shard: half", cut(SINGLE, lambda data: data[: len(data) // 2]), (SINGLE, whole, "expected"))
    yield Case("shard: a pickle", written(SINGLE, b"\x80\x02}q\x00." * 9), (SINGLE, whole, "expected"))
    for name, (content, found) in NO_OBJECTS.items():
        data = len(content).to_bytes(8, "little") + content
        if name not in ("a huge number", "half a surrogate pair"):
            yield Case(f"shard: header {name}", written(SINGLE, data), ("header", found, "expected"))
    for dtype in (3, None, ["F32"]):
        yield Case(
            f"shard: dtype {dtype!r}", entry(QUERY, dtype=dtype), ("header", QUERY, "as dtype", "expected a name")
        )
    yield Case("shard: dtype of another size", entry(QUERY, dtype="F16"), (QUERY, "found 4096 bytes", "expected 2048"))
    for shape in (3, None, [32, -1], [32, "32"], [32.0, 32], [True, 32], [2**70, 1], [1] * 65):
        yield Case(
            f"shard: shape {shape!r:.30}", entry(QUERY, shape=shape), (QUERY, "as shape", "expected a list of sizes")
        )
    yield Case("shard: shape too large", entry(QUERY, shape=[64, 32]), (QUERY, "found 4096 bytes", "expected 8192"))
    yield Case("shard: another shape", entry(QUERY, shape=[16, 64]), (QUERY, "is [16, 64]", "expected [32, 32]"))
    for offsets in (3, None, [0], [8, 0], [0, 1, 2], [-8, 0], ["a", "b"]):
        yield Case(
            f"shard: offsets {offsets!r}",
            entry(QUERY, data_offsets=offsets),
            (QUERY, "as data_offsets", "expected the first"),
        )
    yield Case("shard: overlapping tensors", entry(QUERY, data_offsets=[0, 4096]), ("begins at byte", "expected"))
    yield Case("shard: past the end", entry(QUERY, data_offsets=[2**40, 2**40 + 4096]), ("begins at byte", "expected"))
    yield Case(
        "shard: entry is a list", header(lambda e: e.update({QUERY: []})), (QUERY, "found a list", "expected an object")
    )
    yield Case("shard: no tensors", header(lambda entries: entries.clear()), (SINGLE, "expected"))
    yield Case("shard: a tensor missing", tensors(lambda t: t.pop(QUERY)), (f"no tensor for {QUERY}", "expected one"))
    yield Case("shard: embeddings missing", tensors(lambda t: t.pop(HEAD)), ("no tensor for", "expected one"))
    for kind, name in (
        ("int8", "I8"),
        ("bool", "BOOL"),
        ("uint8", "U8"),
        ("int32", "I32"),
        ("float8_e4m3fn", "F8_E4M3"),
    ):
        for tensor in (QUERY, "model.layers.3.mlp.down_proj.weight"):
            yield Case(
                f"shard: {tensor} in {name}",
                stored_as(tensor, kind),
                (f"{tensor} is {name}", "expected F32, F16, BF16"),
            )


def _tokenizers() -> Iterator[Case]:
    for name, (content, _) in NO_OBJECTS.items():
        yield Case(
            f"tokenizer.json: {name}", written("tokenizer.json", content), ("the tokenizer does not load", "expected")
        )
    yield Case(
        "tokenizer.json: more ids than embeddings",
        tokenizer(lambda stored: stored["model"]["vocab"].update({"extra": 300})),
        ("the tokenizer has ids up to 300", "expected at most 259"),
    )
    yield Case(
        "tokenizer_config.json: a class of its own",
        written(
            "tokenizer_config.json", '{"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'
        ),
        ("the tokenizer does not load", "expected"),
    )
