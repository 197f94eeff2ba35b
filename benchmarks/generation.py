"""Measure load time, memory and generation speed of a model directory, one sequence at a time."""

import gc
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any


@dataclass(frozen=True)
class Speed:
    """The measures of one directory."""

    load_seconds: float  # with its files in the page cache
    memory_bytes: int  # resident, libraries included
    first_token_seconds: float
    tokens_per_second: float  # after the first one; the median


def measure(folder: Path, *, prompt: int, tokens: int) -> Speed:
    """Measure a directory in a separate process: random `prompt` tokens in, `tokens` out, greedily, batch 1."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure_here, folder, prompt=prompt, tokens=tokens).result()


class _Clock:
    """A streamer of transformers that records the times of tokens: first the prompt, then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _value: Any) -> None:
        self.times.append(perf_counter())

    def end(self) -> None:
        pass


def measure_here(folder: Path, *, prompt: int, tokens: int) -> Speed:
    """Measure a directory in this process; all memory of the process counts."""
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
    load = perf_counter() - begin
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, prompt), generator=draw)

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
    first, *others = (after - before for before, after in pairwise(times))
    return Speed(load, psutil.Process().memory_info().rss, first, 1 / median(others))
