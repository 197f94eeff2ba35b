"""Write dvc.yaml and .gitignore, here and of a new study, from the table of stages: python scripts/pipeline.py."""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.stages import STAGES, Stage, Variant

ROOT = Path(__file__).parent.parent
TARGETS = (ROOT / "dvc.yaml", ROOT / "src/wanda_dvc/study/template/pipeline.yaml")
IGNORES = (ROOT / ".gitignore", ROOT / "src/wanda_dvc/study/template/gitignore")
HEAD = """\
# The pipeline, written by wanda-dvc from its table of stages. `plan` reads params.yaml; the other stages read plan/.
# `--stage-version` is the version of what a stage computes: a wanda-dvc that changes a stage's results raises it, and
# DVC reruns that stage and those after it.
"""
MARK = "\n# `dvc plots show` draws these"  # what follows is written by hand, in the template


def pipeline() -> str:
    """Return the text of dvc.yaml."""
    stages = {
        stage.run_name(name): _entry(stage, name, part)
        for stage in STAGES.values()
        for name, part in stage.variants.items()
    }
    written, yaml = io.StringIO(), YAML()
    yaml.width = 2**16
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump({"stages": stages}, written)
    _, mark, tail = TARGETS[1].read_text(encoding="utf-8").partition(MARK)
    return HEAD + written.getvalue().replace("{text}", "${key}") + mark + tail


def _entry(stage: Stage, name: str, part: Variant) -> dict[str, Any]:
    """Return one stage of dvc.yaml."""
    words = [stage.name, *([name] if name else []), *(["{text}"] if part.by_text else [])]
    entry: dict[str, Any] = {"cmd": f"wanda-dvc {' '.join(words)} --stage-version {stage.version}"}
    if stage.name == "plan":
        entry["params"] = [{"params.yaml": None}]  # all of it
    else:
        entry["deps"] = list(part.deps)
    # `persist` keeps DVC from storing them for its run cache all the same.
    entry["outs"] = [*part.outs, *({path: {"cache": False, "persist": True}} for path in part.uncached)]
    if part.metrics:
        entry["metrics"] = [{path: {"cache": False}} for path in part.metrics]
    return {"foreach": "${perplexity.texts}", "do": entry} if part.by_text else entry


def ignored(text: str) -> str:
    """Return the text of a .gitignore that names what the stages write, without the metrics."""
    kept = [path for stage in STAGES.values() for part in stage.variants.values() for path in part.written]
    folders = [re.match(r"metrics/(details|plots)|(?!metrics)\w+", path) for path in kept]
    lines = dict.fromkeys(f"/{found[0]}/\n" for found in folders if found)
    return re.sub(r"(?<=metrics themselves are committed\.\n)(/[a-z/]+/\n)+", "".join(lines), text)


if __name__ == "__main__":
    for target in TARGETS:
        target.write_text(pipeline(), encoding="utf-8")
    for target in IGNORES:
        target.write_text(ignored(target.read_text(encoding="utf-8")), encoding="utf-8")
