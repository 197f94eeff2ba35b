"""Artifacts of a finished study that the stages and views after them must refuse."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cases import NO_OBJECTS, REMOVED, Case, dotted, removed, replaced_by_folder, replaced_by_pipe, written

STATS, MASKS = "stats/norms/block_001.safetensors", "masks/block_001.safetensors"
GRAM, FISHER = "stats/gram/block_001.safetensors", "stats/gradients/block_001.safetensors"
CHANGED = "not the file that its provenance names"


def provenance(folder: str, **changes: object) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        path = root / folder / "provenance.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, value in changes.items():
            content = dotted(content, name.replace("__", "."), value)
        path.write_text(json.dumps(content), encoding="utf-8")

    return spoil


def block(name: str, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change a block's tensors and header, and seal the artifact again: its digests hold."""

    def spoil(root: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        from wanda_dvc.study.provenance import file_digest

        path = root / name
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["wanda_dvc"])
        new = change(tensors, header)
        save_file(tensors, path, {"wanda_dvc": new if isinstance(new, str) else json.dumps(header)})
        seal(path, file_digest(path))

    return spoil


def seal(path: Path, sha256: str) -> None:
    told = path.parent / "provenance.json"
    content = json.loads(told.read_text(encoding="utf-8"))
    content["files"][path.name] = sha256
    told.write_text(json.dumps(content), encoding="utf-8")


def resealed(name: str, content: bytes) -> Callable[[Path], object]:
    def spoil(root: Path) -> None:
        from wanda_dvc.study.provenance import file_digest

        (root / name).write_bytes(content)
        seal(root / name, file_digest(root / name))

    return spoil


# The artifact, the run that reads it, and the keys that the run needs.
READ = (
    ("models/dense", "calibrate", ("source", "sha256")),
    ("data/calibration", "calibrate", ("source", "sha256")),
    ("data/perplexity/embedded", "perplexity", ("source", "sha256", "join")),
    ("data/tasks/piqa", "zero-shot", ("task", "source", "role", "sha256", "lm_eval", "definition")),
    ("stats/norms", "mask", ("model", "model.source", "model.sha256", "text.source", "text.sha256", "params", "files")),
    ("stats/norms", "stats", ("model.sha256", "files")),
    ("masks", "apply", ("model.source", "model.sha256", "calibration.text.source", "params", "params.method", "files")),
    ("models/pruned", "perplexity-pruned", ("model.source", "masks", "params")),
    ("reference/embedded", "perplexity-pruned", ("dense", "tokens_sha256", "dtype", "files")),
)


def cases() -> Iterator[Case]:
    for folder, run, keys in READ:
        where = f"{folder}/provenance.json"
        if run != "stats":
            for name, (content, found) in NO_OBJECTS.items():
                yield Case(f"{run}: {where}: {name}", written(where, content), (where, found, "expected"), run)
        yield Case(f"{run}: {where}: missing", removed(where), (where, "missing"), run)
        yield Case(
            f"{run}: {where}: a folder", replaced_by_folder(where), (where, "found a folder", "expected a file"), run
        )
        yield Case(f"{run}: {where}: format 9", provenance(folder, format=9), (where, "format 9", "expected 1"), run)
        for key in keys:
            spoiled = provenance(folder, **{key.replace(".", "__"): REMOVED})
            told = (where, "no digests", "expected") if key == "files" else (where, "found nothing", "expected")
            yield Case(f"{run}: {where}: no {key}", spoiled, told, run)
            if key != "files":
                spoiled = provenance(folder, **{key.replace(".", "__"): [1]})
                yield Case(f"{run}: {where}: {key} a list", spoiled, (where, "expected"), run)
    yield from _blocks()
    for part, run in (("calibration", "calibrate"), ("perplexity/embedded", "perplexity")):
        text = f"data/{part}/text.txt"
        yield Case(f"{text}: missing", removed(text), (text, "missing", "expected a file"), run)
        yield Case(f"{text}: a folder", replaced_by_folder(text), (text, "found a folder", "expected a file"), run)
        yield Case(f"{text}: a pipe", replaced_by_pipe(text), (text, "found a pipe", "expected a file"), run)
        yield Case(f"{text}: binary", written(text, b"\xff\x00"), (text, CHANGED, "expected"), run)
    items = "data/tasks/piqa/items.jsonl"
    yield Case(f"{items}: missing", removed(items), (items, "missing", "expected a file"), "zero-shot")
    for name in ("half", "binary"):
        yield Case(f"{items}: {name}", written(items, NO_OBJECTS[name][0]), (items, CHANGED, "expected"), "zero-shot")
    yield from _edited()
    yield from _kinds()
    yield from _tiers()
    for definition in ("../../../../evil.yaml", "/tmp/evil.yaml", "piqa", "nowhere/x.yaml", "."):
        yield Case(
            f"definition {definition}",
            provenance("data/tasks/piqa", definition=definition),
            ("data/tasks/piqa", f"got the definition {definition}", "expected one of lm-eval's"),
            "zero-shot",
        )
    yield from _shown()


def edited(name: str, place: int = -1) -> Callable[[Path], object]:
    """Change one byte of a file, which keeps its size."""

    def spoil(root: Path) -> None:
        content = bytearray((root / name).read_bytes())
        content[place] ^= 1
        (root / name).write_bytes(content)

    return spoil


def _edited() -> Iterator[Case]:
    """A file that a stage reads has changed since the stage that wrote it."""
    for name, runs in (
        ("models/dense/model.safetensors", ("calibrate", "mask", "apply", "perplexity", "zero-shot")),
        ("models/dense/config.json", ("mask", "apply")),
        ("models/dense/tokenizer.json", ("calibrate", "perplexity", "zero-shot")),
        ("models/pruned/model.safetensors", ("perplexity-pruned", "zero-shot-pruned")),
        ("models/pruned/tokenizer.json", ("perplexity-pruned",)),
        ("data/calibration/text.txt", ("calibrate", "mask-paper")),
        ("data/perplexity/embedded/text.txt", ("perplexity",)),
        ("data/tasks/piqa/items.jsonl", ("zero-shot",)),
        (STATS, ("mask", "stats")),
        (MASKS, ("apply",)),
        (GRAM, ("mask-fisher", "apply-refit")),
        (FISHER, ("mask-fisher",)),
    ):
        for run in runs:
            yield Case(f"{run}: {name}: one byte", edited(name), (name, CHANGED, "expected"), run)


def _kinds() -> Iterator[Case]:
    """An artifact of another kind, with digests that hold."""
    for folder, run in (
        ("models/dense", "calibrate"),
        ("data/calibration", "calibrate"),
        ("data/perplexity/embedded", "perplexity"),
        ("data/tasks/piqa", "zero-shot"),
        ("stats/norms", "mask"),
        ("stats/gram", "mask-fisher"),
        ("stats/gradients", "mask-fisher"),
        ("stats/gram", "apply"),
        ("masks", "apply"),
        ("models/pruned", "perplexity-pruned"),
    ):
        for kind in ("plan", 7, None, REMOVED):
            name = "removed" if kind is REMOVED else str(kind)
            yield Case(
                f"{run}: {folder}: kind {name}",
                provenance(folder, kind=kind),
                (f"{folder}/provenance.json", "kind: found", "expected"),
                run,
            )

    def copied(source: str, target: str) -> Callable[[Path], object]:
        def spoil(root: Path) -> None:
            shutil.rmtree(root / target)
            shutil.copytree(root / source, root / target)

        return spoil

    for source, target, run in (
        ("stats/gram", "stats/gradients", "mask-fisher"),
        ("stats/gradients", "stats/gram", "mask-fisher"),
        ("stats/norms", "stats/gram", "mask-fisher"),
        ("stats/norms", "masks", "apply"),
        ("masks", "stats/norms", "mask"),
        ("data/calibration", "models/dense", "mask"),
    ):
        found = f"{target}/provenance.json"
        yield Case(f"{run}: {source} as {target}", copied(source, target), (found, "expected"), run)
    for folder in ("stats/gram", "stats/gradients"):
        for dtype in ("float32", "none", REMOVED):
            name = "removed" if dtype is REMOVED else str(dtype)
            spoiled = provenance(folder, dtype=dtype)
            yield Case(f"{folder}: dtype {name}", spoiled, (folder, "dtype: found", "expected float16"), "mask-fisher")
        for key in ("model.source", "text.source", "params.seed"):
            spoiled = provenance(folder, **{key.replace(".", "__"): "another"})
            yield Case(f"{folder}: another {key}", spoiled, (folder, "expected those of the run"), "mask-fisher")


def _tiers() -> Iterator[Case]:
    """Tensors that no calibration writes, in files that are sealed again."""

    def each(end: str, change: Callable[[Any], Any]) -> Callable[..., object]:
        return lambda tensors, _: tensors.update({n: change(x) for n, x in tensors.items() if n.endswith(end)})

    def filled(value: float, x: Any) -> Any:
        return x.fill_(value)

    def to(kind: str) -> Callable[[Any], Any]:
        import torch

        return lambda x: x.to(getattr(torch, kind))

    for path, run in ((GRAM, "mask-fisher"), (FISHER, "apply-fisher")):
        for end, kinds in (
            (".triangle", ("float32", "bfloat16", "int16")),
            (".norm", ("float64", "float16")),
            (".count", ("int32", "float32")),
        ):
            for kind in kinds:
                spoiled = block(path, each(end, to(kind)))
                yield Case(f"{path}: {end} in {kind}", spoiled, (path, "no Gram matrix of", "expected"), run)
        for end in (".triangle", ".norm"):
            for value in (float("nan"), float("inf")):
                spoiled = block(path, each(end, partial(filled, value)))
                says = (path, "not finite", "expected")
                yield Case(f"{path}: {end} {value}", spoiled, says, run)
        zeros = block(path, each(".norm", lambda x: x.zero_()))
        yield Case(f"{path}: norms of 0", zeros, (path, "matrices of zeros", "expected"), run)
    for name, value in (("0", 0.0), ("nan", float("nan")), ("-1", -1.0), ("inf", float("inf"))):
        spoiled = block(FISHER, each(".squared_gradients", partial(filled, value)))
        yield Case(f"{FISHER}: sums {name}", spoiled, (FISHER, "damaged", "expected"), "mask-fisher")
    yield Case(
        f"{FISHER}: sums in float32",
        block(FISHER, each(".squared_gradients", to("float32"))),
        (FISHER, "damaged", "expected"),
        "mask-fisher",
    )


def _shown() -> Iterator[Case]:
    """Results that `show` reads."""
    metrics = ("metrics/pruned/sparsity.json", "metrics/dense/perplexity/embedded.json", "metrics/dense/zero_shot.json")
    for path in (*metrics, "masks/provenance.json", "models/pruned/provenance.json"):
        for name in ("empty", "half", "a list", "binary", "deep", "null", "a huge number", "half a surrogate pair"):
            content, found = NO_OBJECTS[name]
            yield Case(f"show: {path} is {name}", written(path, content), (path, found, "expected"), "show")
        yield Case(f"show: {path}: a folder", replaced_by_folder(path), (path, "found a folder", "expected"), "show")
    for path in metrics:
        name = Path(path).stem
        for odd, found in (("x", "text"), ([1], "a list"), (None, "null")):
            spoiled = written(path, json.dumps({name: odd}))
            yield Case(
                f"show: {path}: {name} is {found}",
                spoiled,
                (path, f"{name}: found {found}", "expected a number"),
                "show",
            )
    for folder, keys in (
        ("masks", ("model.source", "params", "params.method")),
        ("models/pruned", ("masks", "params")),
    ):
        for key in keys:
            for value in (REMOVED, [1], None):
                spoiled = provenance(folder, **{key.replace(".", "__"): value})
                name = "removed" if value is REMOVED else str(value)
                yield Case(f"show: {folder}: {key} {name}", spoiled, (f"{folder}/provenance.json", "expected"), "show")


def _without(key: str, _: dict[str, Any], header: dict[str, Any]) -> None:
    header.pop(key)


def _as_list(key: str, _: dict[str, Any], header: dict[str, Any]) -> None:
    header[key] = [1]


def _blocks() -> Iterator[Case]:
    for path, run, key in ((STATS, "mask", "readers"), (MASKS, "apply", "columns")):
        yield Case(f"{path}: missing", removed(path), (path.partition("/")[0], "found 3 blocks", "expected 4"), run)
        yield Case(f"{path}: a folder", replaced_by_folder(path), (path, "found a folder", "expected a file"), run)
        yield Case(f"{path}: empty", resealed(path, b""), (path, "found 0 bytes", "expected"), run)
        yield Case(
            f"{path}: text", resealed(path, b"hello, world"), (path, "incomplete safetensors file", "expected"), run
        )
        yield Case(f"{path}: no {key}", block(path, partial(_without, key)), (path, "damaged", "expected"), run)
        yield Case(f"{path}: {key} a list", block(path, partial(_as_list, key)), (path, "damaged"), run)
        yield Case(f"{path}: header a list", block(path, lambda *_: "[1]"), (path, "found a list", "expected"), run)
        yield Case(f"{path}: header no JSON", block(path, lambda *_: "x"), (path, "found no JSON", "expected"), run)
        yield Case(f"{path}: header deep", block(path, lambda *_: "[" * 10**5), (path, "too deeply", "expected"), run)

    def first(tensors: dict[str, Any], end: str) -> str:
        return next(name for name in sorted(tensors) if name.endswith(end))

    def dtype(kind: str, end: str) -> Callable[..., object]:
        import torch

        return lambda t, _: t.update({first(t, end): t[first(t, end)].to(getattr(torch, kind))})

    yield Case(
        f"{STATS}: no sums", block(STATS, lambda t, _: t.pop(first(t, ".sum"))), (STATS, "no statistics of"), "mask"
    )
    yield Case(
        f"{STATS}: no count", block(STATS, lambda t, _: t.pop(first(t, ".count"))), (STATS, "no statistics of"), "mask"
    )
    yield Case(f"{STATS}: float32", block(STATS, dtype("float32", ".sum")), (STATS, "damaged", "expected"), "mask")
    yield Case(
        f"{STATS}: a short sum",
        block(STATS, lambda t, _: t.update({first(t, ".sum"): t[first(t, ".sum")][:1]})),
        (STATS, "damaged"),
        "mask",
    )
    yield Case(
        f"{STATS}: a matrix",
        block(STATS, lambda t, _: t.update({first(t, ".sum"): t[first(t, ".sum")][None]})),
        (STATS, "damaged"),
        "mask",
    )
    yield Case(
        f"{STATS}: transposed text", block(STATS, lambda _, h: h.update(transposed="x")), (STATS, "damaged"), "mask"
    )
    yield Case(
        f"{STATS}: a reader is a number",
        block(STATS, lambda _, h: h["readers"].update({next(iter(h["readers"])): [3]})),
        (STATS, "damaged"),
        "mask",
    )
    yield Case(
        f"{STATS}: lm_head reads",
        block(STATS, lambda _, h: h["readers"].update({next(iter(h["readers"])): ["lm_head"]})),
        ("no weight of lm_head",),
        "mask",
    )
    yield Case(
        f"{STATS}: not finite",
        block(STATS, lambda t, _: t[first(t, ".sum_squares")].fill_(float("nan"))),
        ("block 1", "not finite", "expected finite"),
        "mask",
    )
    for kind in ("bool", "int8", "float32", "int64"):
        yield Case(
            f"{MASKS}: {kind}", block(MASKS, dtype(kind, "q_proj")), (MASKS, f"torch.{kind}", "expected"), "apply"
        )
    yield Case(
        f"{MASKS}: fewer rows",
        block(MASKS, lambda t, _: t.update({first(t, "q_proj"): t[first(t, "q_proj")][:-1].clone()})),
        ("masks/", "q_proj is [31, 32]", "expected [32, 32]"),
        "apply",
    )
    yield Case(
        f"{MASKS}: more columns",
        block(MASKS, lambda _, h: h["columns"].update({first(h["columns"], "q_proj"): 99})),
        (MASKS, "for 99 columns", "expected"),
        "apply",
    )
    yield Case(
        f"{MASKS}: columns are text",
        block(MASKS, lambda _, h: h["columns"].update({first(h["columns"], "q_proj"): "32"})),
        (MASKS, "for 32 columns", "expected"),
        "apply",
    )
    yield Case(
        f"{MASKS}: another linear",
        block(
            MASKS,
            lambda t, h: (
                t.update({"lm_head.x": t.pop(first(t, "q_proj"))}),
                h["columns"].update({"lm_head.x": h["columns"].pop(first(h["columns"], "q_proj"))}),
            ),
        ),
        ("no weight of lm_head.x",),
        "apply",
    )
