"""Measures load and generation speed of a model directory, dense and packed, or of several directories.

One sequence at a time.
"""

import gc
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from wanda_dvc.errors import UserError, notice
from wanda_dvc.machine import processor
from wanda_dvc.study.files import json_text
from wanda_dvc.study.markup import table

EXPORT = "wanda-dvc export --format packed"


@dataclass(frozen=True)
class Speed:
    """The measures of one directory."""

    load_seconds: float  # with its files in the page cache
    memory_bytes: int  # resident, libraries included; on a GPU the peak of the allocated memory there
    first_token_seconds: float
    tokens_per_second: float  # after the first one; the median


def speed(*, folders: Sequence[Path], prompt: int, tokens: int, device: str, as_json: bool = False) -> str:
    """Return load time, memory and speed of several directories, or of one, dense and packed: a table, or JSON.

    The missing form is written into a temporary directory. If packing does not shrink a dense directory, only the dense
    form is measured.
    """
    machine = _machine(device)
    for folder in folders:
        _check(folder, prompt, tokens)
    measured: dict[str, Speed] = {}
    stored: dict[str, int] = {}
    several = len(folders) > 1
    places = nullcontext(({str(folder): folder for folder in folders}, "")) if several else _both(folders[0])
    with places as (forms, said):
        for form, place in forms.items():
            notice(f"{form}: {place}")
            measured[form] = measure(place, prompt=prompt, tokens=tokens, device=device)
            stored[form] = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    columns = {form: {"stored_bytes": stored[form], **asdict(found)} for form, found in measured.items()}
    if as_json:
        how = {"directories": [*map(str, folders)], **machine, "prompt_tokens": prompt, "tokens": tokens}
        return json_text({**how, "measured": columns, "note": said})
    headers = ["", *columns, *(["ratio" if several else "packed / dense"] if len(columns) == 2 else [])]
    head = f"{', '.join(machine.values())}; one sequence, {prompt} tokens in, {tokens} out"
    return "\n".join([head, "", table(headers, [*_rows(columns)]), *(["", said] if said else [])])


def _rows(columns: dict[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Return a row per measure, with the ratio if there are two columns."""
    for label, key, unit, digits in (
        ("weights on disk, GB", "stored_bytes", 1e9, 2),
        ("load, s", "load_seconds", 1, 2),
        ("resident memory, GB", "memory_bytes", 1e9, 2),
        ("time to first token, s", "first_token_seconds", 1, 2),
        ("tokens a second", "tokens_per_second", 1, 1),
    ):
        found = [column[key] for column in columns.values()]
        ratio = [f"{found[1] / found[0]:.2f} ×"] if len(found) == 2 else []
        yield [label, *(f"{number / unit:,.{digits}f}" for number in found), *ratio]


def _machine(device: str) -> dict[str, str]:
    """Return the device's name; for a CPU also its threads and the kernel. UserError without such a device."""
    import torch

    from wanda_dvc.engine import accelerator
    from wanda_dvc.packed.kernel import PATHS, kernel

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: got {device}, expected cpu or cuda: {str(error).splitlines()[0]}") from None
    if torch.device(device).type == "cuda":
        return {"device": accelerator.full_name(device)}
    found = kernel()  # compiled here, outside the measured load
    path = f"kernel {PATHS[found.path]}" if found else "no kernel"
    return {"device": processor(), "threads": f"{torch.get_num_threads()} threads", "kernel": path}


def _check(folder: Path, prompt: int, tokens: int) -> None:
    """Raise for directories that cannot be measured."""
    from wanda_dvc.engine.config import positions_of, read_config

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no config.json, expected a model's directory")
    most = positions_of(read_config(folder))
    if most is not None and prompt + tokens > most:
        raise UserError(f"--prompt and --tokens: got {prompt} + {tokens}, expected at most {most} for this model")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: no .safetensors file, expected a model's directory with them")


@contextmanager
def _both(folder: Path) -> Iterator[tuple[dict[str, Path], str]]:
    """Yield the directory of each form, and a sentence about them. One is temporary."""
    from wanda_dvc.packed.directory import pack_directory, unpack_directory  # the measuring process needs no engine
    from wanda_dvc.packed.format import packing_of

    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch)
        if packing_of(folder) is not None:
            notice(f"{folder} is packed; the dense one is written to {other}")
            unpack_directory(folder, other)
            yield {"dense": other, "packed": folder}, f"{folder} is packed; the dense one was made from it."
            return
        notice(f"{folder} is dense; a packed one is written to {other}")
        sizes = pack_directory(folder, other)
        if sizes.packed < sizes.dense:
            yield {"dense": folder, "packed": other}, f"{folder} is dense; `{EXPORT}` writes a packed one."
        else:
            yield {"dense": folder}, f"{folder} has too few zeros to be smaller without them: nothing to pack."


def measure(folder: Path, *, prompt: int, tokens: int, device: str) -> Speed:
    """Measure a directory in a separate process: random `prompt` tokens in, `tokens` out, greedily, batch 1.

    UserError if the process is killed, such as when memory runs out.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure_here, folder, prompt=prompt, tokens=tokens, device=device).result()
        except BrokenProcessPool:
            raise UserError(f"{folder}: the process was killed, probably for lack of memory; free some") from None


class _Clock:
    """A streamer of transformers that records the times of tokens: first the prompt, then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


def measure_here(folder: Path, *, prompt: int, tokens: int, device: str) -> Speed:
    """Measure a directory in this process; all memory of the process counts."""
    import psutil
    import torch
    import transformers

    from wanda_dvc.engine.accelerator import peak_memory

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    begin = perf_counter()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    model.to(device)
    load = perf_counter() - begin
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, prompt), generator=draw).to(device)

    def generate(count: int) -> list[float]:
        clock, begin = _Clock(), perf_counter()
        how = transformers.GenerationConfig(
            do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0, eos_token_id=None
        )
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how, streamer=clock)
        return [begin, *clock.times[1:]]

    generate(2)  # excludes one-time work from the measurement
    gc.collect()
    times = generate(tokens)
    on_gpu = torch.device(device).type == "cuda"
    memory = peak_memory(device) if on_gpu else psutil.Process().memory_info().rss
    first, *others = (after - before for before, after in pairwise(times))
    return Speed(load, memory, first, 1 / median(others))
