"""Continuations of the study's prompts, a part of `zero-shot`: what a model writes."""

from wanda_dvc.errors import notice
from wanda_dvc.reading import is_there, read_text
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.running import device_name, free_memory, own_device
from wanda_dvc.study.files import Json
from wanda_dvc.study.project import Project
from wanda_dvc.study.protocol import dense_of
from wanda_dvc.study.provenance import describe, digest, tokenizer_digest
from wanda_dvc.study.scaffold import FILES, PROMPTS


def read_prompts(project: Project) -> list[str]:
    """Return the prompts of a study's prompts.txt, one a line; without the file, those of a new study."""
    path = project.root / PROMPTS
    text = read_text(path) if is_there(path) else FILES[PROMPTS].read_text(encoding="utf-8")
    return [line.strip() for line in text.split("\n") if line.strip()]


def protocol(project: Project, model: str, measured: Json) -> Json:
    """Return the inputs that determine the continuations. `measured` is the model's provenance."""
    from wanda_dvc.engine.continuations import TOKENS

    return describe(
        "continuations",
        version=STAGES["zero-shot"].version,
        libraries=("torch", "transformers"),
        model=digest(measured),
        dense=dense_of(model, measured),
        tokenizer_sha256=tokenizer_digest(project.model(model)),
        prompts_sha256=digest(read_prompts(project)),
        tokens=TOKENS,
        dtype=project.params.dtype,
    )


def continued(project: Project, model: str) -> Json:
    """Return each prompt's continuation by a model; or the reason to skip them, if the memory is too small."""
    import torch

    from wanda_dvc.engine.continuations import TOKENS, continuations
    from wanda_dvc.engine.windows import load_tokenizer, tokenize
    from wanda_dvc.stages.needs import continuing, known

    folder, params, prompts = project.model(model), project.params, read_prompts(project)
    tokenizer = load_tokenizer(folder)
    longest = max((len(tokenize(prompt, tokenizer)) for prompt in prompts), default=0)
    needed = continuing(known(project, model), longest + TOKENS)
    if needed > (free := free_memory(device_name(params.runtime))):
        skipped = f"the model needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB were free"
        again = f"`dvc repro --force --single-item zero-shot@{model}` writes them when there is more"
        notice(f"zero-shot {model}: no continuations: {skipped}; {again}")
        return {"skipped": skipped}
    written = continuations(
        folder, prompts, dtype=getattr(torch, params.dtype), device=own_device(params.runtime), source=PROMPTS
    )
    pairs = zip(prompts, written, strict=True)
    return {"prompts": [{"prompt": prompt, "text": one.text, "tokens": one.tokens} for prompt, one in pairs]}
