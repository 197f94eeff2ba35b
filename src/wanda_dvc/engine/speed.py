"""How fast a model directory loads and generates, one sequence at a time."""

import gc
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from wanda_dvc.errors import UserError


@dataclass(frozen=True)
class Speed:
    """What was measured of one directory."""

    load_seconds: float  # its files were in the page cache
    memory_bytes: int  # resident, libraries included; on a GPU, the most that was allocated there
    first_token_seconds: float
    tokens_per_second: float  # after the first one; the median


def measure(folder: Path, *, prompt: int, tokens: int, device: str) -> Speed:
    """Measure a directory in a process of its own: random `prompt` tokens in, `tokens` out, greedily, batch 1.

    UserError where the process is killed, as it is where memory runs out.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(measure_here, folder, prompt=prompt, tokens=tokens, device=device).result()
        except BrokenProcessPool:
            raise UserError(f"{folder}: the process was killed, expected memory for the model; free some") from None


class _Clock:
    """A streamer of transformers that notes when tokens come: first the prompt, then each new one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


def measure_here(folder: Path, *, prompt: int, tokens: int, device: str) -> Speed:
    """Measure a directory in this process: its memory counts, whatever it holds."""
    import psutil
    import torch
    import transformers

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

    generate(2)  # what is only done once is not measured
    gc.collect()
    times = generate(tokens)
    if torch.device(device).type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = psutil.Process().memory_info().rss
    first, *others = (after - before for before, after in pairwise(times))
    return Speed(load, memory, first, 1 / median(others))
