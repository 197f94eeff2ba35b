"""Run the README's demo, `wanda-dvc prune --pattern neurons`, and write what it prints and needs: benchmarks/demo.json.

    python benchmarks/demo.py                  minutes on two cores; then scripts/figures.py writes it into the README

Below the table, both models continue a prompt, greedily.
"""

import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path

from origin import HERE, Row, origin, write_row
from transformers import AutoModelForCausalLM, AutoTokenizer

COMMAND = ("wanda-dvc", "prune", "--pattern", "neurons")
STAGES = ("download", "calibrate", "mask", "apply", "perplexity")
PROMPT = "The three things that every plant needs to grow are"
TOKENS = 24


def continuation(model: Path) -> str:
    """Return the prompt's greedy continuation by a model, on one line."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = AutoModelForCausalLM.from_pretrained(model).generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    text = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    return " ".join(text.split())


def main() -> None:
    """Run the demo in a temporary folder, and write its rows."""
    protocol = " ".join(COMMAND)
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name), time.perf_counter()
        environment = os.environ | {"XDG_CACHE_HOME": name}
        printed = subprocess.run(COMMAND, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        needs: Row = {"seconds": time.perf_counter() - began, "processor_seconds": used.ru_utime + used.ru_stime}
        # DVC links the files of the study to those of its cache.
        kept = {path.stat().st_ino: path.stat().st_size for path in folder.glob("wanda-dvc/**/*") if path.is_file()}
        needs["cache"] = sum(kept.values())
        text = summary(printed.stdout, *folder.glob("wanda-dvc/*/models/dense"), *folder.glob("llm-*"))
    write_row(HERE / "demo.json", "printed", text, origin(protocol, STAGES))
    write_row(HERE / "demo.json", "needs", needs, origin(protocol))


def summary(printed: str, dense: Path, pruned: Path) -> str:
    """Return the first sentence and the table that the command printed, without times, and the continuations."""
    sentence, *lines = printed.splitlines()
    rows = [sentence, "", *(line for line in lines if line.startswith("|") and "seconds" not in line)]
    texts = [f"{title} {continuation(model)} …" for title, model in (("dense: ", dense), ("pruned:", pruned))]
    return "\n".join([*rows, "", f"{PROMPT} …", *texts]) + "\n"


if __name__ == "__main__":
    main()
