"""What is on disk: the only module that knows file names, tensor keys, dtypes and provenance.

Every artifact is safetensors or JSON, written beside its place and renamed, and carries a
`provenance.json`: format version, what it was made from (with hashes), the parameters that made it,
and the versions of the libraries that computed it. Nothing in it depends on time, host or path.
"""

import contextlib
import csv
import gzip
import hashlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, overload

from wanda_dvc import __version__
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, read_params

if TYPE_CHECKING:
    from torch import Tensor

    from wanda_dvc.input_stats import BlockStats

FORMAT = 1
PROVENANCE = "provenance.json"
TEXT = "text.txt"
DOCUMENTS = "documents.json.gz"
ITEMS = "items.jsonl"
Json = dict[str, Any]


@dataclass(frozen=True)
class Project:
    """A pruning study: a directory with `params.yaml`, `dvc.yaml` and everything that the stages write."""

    root: Path

    @classmethod
    def find(cls, start: Path | None = None) -> "Project":
        """The project that holds `start` (by default this folder): the nearest one with a `params.yaml`."""
        start = (start or Path.cwd()).resolve()  # not DVC_ROOT: in a queued experiment that is another checkout
        for folder in (start, *start.parents):
            if (folder / "params.yaml").is_file():
                return cls(folder)
        raise UserError(f"{start}: no params.yaml here or above, expected a wanda-dvc project; cd into one")

    @cached_property
    def params(self) -> Params:
        return read_params(self.root / "params.yaml")

    def model(self, which: str) -> Path:
        """`dense` or `pruned`."""
        return self.root / "models" / which

    def data(self, part: str) -> Path:
        """`calibration`, `perplexity` or `tasks`."""
        return self.root / "data" / part

    def text(self, part: str) -> str:
        """The text of `data/calibration` or `data/perplexity`."""
        return (self.data(part) / TEXT).read_bytes().decode("utf-8")  # read_text would change its line ends

    @contextlib.contextmanager
    def documents(self, part: str) -> Iterator["Documents | None"]:
        """The documents of `data/calibration`, where it holds those and not one text.

        They are unpacked into a temporary file of the project, since a system's own place for such may be memory.
        """
        shard = self.data(part) / DOCUMENTS
        if not shard.is_file():
            yield None
            return
        column = read_provenance(self.data(part), f"download {part}")["column"]
        self.work_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.work_root) as scratch:
            yield Documents.unpack(shard, column, scratch)

    @property
    def work_root(self) -> Path:
        """Under DVC, in the repository that it was started in: a queued experiment's checkout is temporary."""
        return Path(os.environ.get("DVC_ROOT") or self.root) / ".dvc" / "tmp" / "wanda-dvc"

    @property
    def stats(self) -> Path:
        return self.root / "stats"

    @property
    def masks(self) -> Path:
        return self.root / "masks"

    def metrics(self, which: str, name: str) -> Path:
        """The numbers that are compared: `metrics/dense/perplexity.json`."""
        return self.root / "metrics" / which / f"{name}.json"

    def details(self, which: str, name: str) -> Path:
        """What stands behind the numbers: protocol, and each window's or item's result."""
        return self.root / "metrics" / "details" / which / f"{name}.json"

    def times(self, stage: str) -> Path:
        """Seconds and machine of a stage's last run."""
        return self.root / "metrics" / "times" / f"{stage}.json"

    def plots(self, name: str) -> Path:
        """What DVC's plots are drawn from, and the report's."""
        return self.root / "metrics" / "plots" / f"{name}.csv"

    @contextlib.contextmanager
    def work(self, made_from: Json) -> Iterator["Work"]:
        """Where a stage keeps unfinished work: one place for each set of inputs, parameters and versions.

        One process at a time works there.
        """
        from filelock import FileLock, Timeout

        path = self.work_root / digest(made_from)[:32]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print("waiting for another run with the same inputs and parameters …", file=sys.stderr, flush=True)
            lock.acquire()
        try:
            yield Work(path)
        finally:
            lock.release()


@dataclass(frozen=True)
class Work:
    """A stage's unfinished work. It survives a kill; the next run with the same inputs finds it."""

    path: Path

    @property
    def out(self) -> Path:
        """The artifact so far."""
        folder = self.path / "out"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fresh(self) -> Path:
        """An empty folder for the artifact, for stages that are not worth resuming."""
        shutil.rmtree(self.path / "out", ignore_errors=True)
        return self.out

    def publish(self, target: Path) -> None:
        """Put the finished artifact in its place and forget the rest."""
        publish(self.out, target)
        self.forget()

    def forget(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True)
class Documents(Sequence[str]):
    """The documents of a gzipped file, a JSON object a line, read one at a time by their number.

    Gzip can't be entered in the middle, so the lines are unpacked once, to a file; in memory there is only where each
    begins.
    """

    lines: IO[bytes]
    starts: "array[int]"  # one more than there are documents
    column: str
    shard: Path

    @classmethod
    def unpack(cls, shard: Path, column: str, scratch: IO[bytes]) -> "Documents":
        """UserError if it isn't whole."""
        starts = array("q", [0])
        try:
            with gzip.open(shard) as packed:
                for line in packed:
                    scratch.write(line)
                    starts.append(starts[-1] + len(line))
        except (OSError, EOFError) as error:
            raise UserError(f"{shard}: damaged ({error}), expected lines of JSON, gzipped; fetch it again") from None
        return cls(scratch, starts, column, shard)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        begin, end = self.starts[index], self.starts[index + 1]
        self.lines.seek(begin)
        try:
            document = json.loads(self.lines.read(end - begin))[self.column]
            if isinstance(document, str):
                return document
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.shard}: line {index + 1}: no text `{self.column}`, expected one in every line")


def publish(source: Path, target: Path) -> None:
    """Move a finished directory to its place; what was there goes only once the new one is ready."""
    beside = target.with_name(target.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, beside)  # a rename, but for work that lies on another file system
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    beside.replace(target)


def digest(content: object) -> str:
    """SHA-256 of something that JSON can say, in one canonical spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write beside its place and rename: a reader never sees half a file, a link's target is never touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    beside.replace(path)


def write_csv(path: Path, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write as `write_json` does. Floats have six significant digits: later ones differ between machines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(headers)
        writer.writerows([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    beside.replace(path)


def read_json(path: Path, made_by: str) -> Any:
    """Read an artifact's JSON. UserError naming the command that makes it, if it isn't there or isn't ours."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `dvc repro` or `wanda-dvc {made_by}` first") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}); run `wanda-dvc {made_by}` again") from None


def describe(kind: str, *, libraries: tuple[str, ...] = (), **content: object) -> Json:
    """A provenance: what kind of artifact, what it was made from, and which libraries computed it."""
    versions = {name: version(name) for name in libraries}
    return {"format": FORMAT, "kind": kind, "wanda_dvc": __version__, "libraries": versions, **content}


def read_provenance(artifact: Path, made_by: str) -> Json:
    """The provenance of an artifact that this version can read."""
    content = read_json(artifact / PROVENANCE, made_by)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{artifact / PROVENANCE}: format {content.get('format')}, expected {FORMAT}; "
            f"run `wanda-dvc {made_by}` again"
        )
    return content


def write_provenance(artifact: Path, content: Json) -> None:
    write_json(artifact / PROVENANCE, content)


def files_digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but for its provenance."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != PROVENANCE)
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}


def tokenizer_digest(model: Path) -> str:
    """SHA-256 over the files that a model's tokenizer is made of."""
    patterns = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
    files = sorted({path for pattern in patterns for path in model.glob(pattern)})
    return digest({path.name: file_digest(path) for path in files})


# --- stats/ and masks/: one file a block, so that neither a writer nor a reader ever holds them all ---


def block_file(folder: Path, block: int) -> Path:
    return folder / f"block_{block:03d}.safetensors"


def write_stats(folder: Path, block: int, stats: "BlockStats") -> None:
    """One block's statistics: for each distinct input `NAME.sum_squares` and `NAME.sum` (float64 [in]) and
    `NAME.count` (int64); who reads it, and which of them are stored transposed, is in the header."""
    import torch

    tensors: dict[str, Tensor] = {}
    for name, x in stats.inputs.items():
        tensors |= {f"{name}.sum_squares": x.sum_squares, f"{name}.sum": x.sum, f"{name}.count": torch.tensor(x.count)}
    header = {"readers": stats.readers, "transposed": stats.transposed}
    _save(block_file(folder, block), tensors, header)


def read_stats(folder: Path, block: int) -> "BlockStats":
    """As `write_stats` took them."""
    from wanda_dvc.input_stats import BlockStats, InputStats

    tensors, header = _load(block_file(folder, block), "calibrate")
    readers = header["readers"]
    inputs = {
        name: InputStats(tensors[f"{name}.sum_squares"], tensors[f"{name}.sum"], int(tensors[f"{name}.count"]))
        for name in readers
    }
    return BlockStats(inputs, readers, header["transposed"])


def write_masks(folder: Path, block: int, keeps: "dict[str, Tensor]") -> None:
    """One block's `keep` masks, in the orientation in which the weights are stored, one bit a weight: uint8
    [rows, ⌈columns / 8⌉], the first column in the highest bit."""
    import numpy as np
    import torch

    packed = {name: torch.from_numpy(np.packbits(keep.cpu().numpy(), axis=1)) for name, keep in keeps.items()}
    columns = {name: keep.shape[1] for name, keep in keeps.items()}
    _save(block_file(folder, block), packed, {"columns": columns})


def read_masks(folder: Path, block: int) -> "dict[str, Tensor]":
    """One block's `keep` masks, bool, in the orientation in which the weights are stored."""
    import numpy as np
    import torch

    tensors, header = _load(block_file(folder, block), "mask")
    return {
        name: torch.from_numpy(np.unpackbits(tensors[name].numpy(), axis=1, count=size)).bool()
        for name, size in header["columns"].items()
    }


def block_count(folder: Path) -> int:
    return len(list(folder.glob("block_*.safetensors")))


def _save(path: Path, tensors: "dict[str, Tensor]", header: Json) -> None:
    from safetensors.torch import save_file

    beside = path.with_name(path.name + ".part")
    # One key: safetensors writes several in an order that changes from run to run.
    save_file(tensors, beside, {"wanda_dvc": json.dumps(header)})
    beside.replace(path)


def _load(path: Path, made_by: str) -> "tuple[dict[str, Tensor], Json]":
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["wanda_dvc"])
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run `dvc repro` or `wanda-dvc {made_by}` first") from None
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); run `wanda-dvc {made_by}` again") from None
