"""Run the README's demo, `wanda-dvc prune --pattern neurons`, and write what it prints: benchmarks/demo.txt.

    python benchmarks/demo.py                  minutes on two cores; then scripts/figures.py writes it into the README

Below the table, both models continue a prompt, greedily.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from origin import HERE
from transformers import AutoModelForCausalLM, AutoTokenizer

COMMAND = ("wanda-dvc", "prune", "--pattern", "neurons")
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
    """Run the demo in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"XDG_CACHE_HOME": name}
        printed = subprocess.run(COMMAND, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        write_demo(printed.stdout, *folder.glob("wanda-dvc/*/models/dense"), *folder.glob("llm-*"))


def write_demo(printed: str, dense: Path, pruned: Path) -> None:
    """Write the first sentence and the table that the command printed, without times, and the continuations."""
    summary, *lines = printed.splitlines()
    rows = [summary, "", *(line for line in lines if line.startswith("|") and "seconds" not in line)]
    texts = [f"{title} {continuation(model)} …" for title, model in (("dense: ", dense), ("pruned:", pruned))]
    (HERE / "demo.txt").write_text("\n".join([*rows, "", f"{PROMPT} …", *texts]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
