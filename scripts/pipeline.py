"""Write dvc.yaml and .gitignore, of this repository and of a new study, from the table of stages.

python scripts/pipeline.py
"""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from wanda_dvc.stages import STAGES, Part, Stage

ROOT = Path(__file__).parent.parent
TARGETS = (ROOT / "dvc.yaml", ROOT / "src/wanda_dvc/study/template/pipeline.yaml")
IGNORES = (ROOT / ".gitignore", ROOT / "src/wanda_dvc/study/template/gitignore")
HEAD = """\
# The pipeline, written by wanda-dvc from its table of stages. `plan` reads params.yaml; the other stages read plan/.
# `--stage-version` is the version of what a stage computes: a wanda-dvc that changes a stage's results raises it, and
# DVC reruns that stage and those after it.
"""
TAIL = """
# `dvc plots show` draws these, `dvc plots diff NAME NAME` those of several experiments over each other.
plots:
  - accuracy by task:
      title: Zero-shot accuracy, ± one standard error over items
      template: accuracy
      x: item
      y:
        metrics/plots/dense/zero_shot.csv: acc
        metrics/plots/pruned/zero_shot.csv: acc
  - sparsity by block:
      title: Measured sparsity by block
      template: by_block
      x: block
      x_label: block
      y:
        metrics/plots/sparsity.csv: sparsity
      y_label: sparsity
  - layer error by block: # with Gram matrices
      title: "Layer error: how far each linear's output is off"
      template: by_block
      x: block
      x_label: block
      y:
        metrics/plots/layer_error.csv: error
      y_label: ‖(W−Ŵ)X‖² / ‖WX‖²
  - input norms by block:
      title: "Input norms by block: the largest, and dashed the median"
      template: norms_by_block
      x: block
      x_label: block
      y:
        metrics/plots/norms.csv: largest
      y_label: ‖X‖₂, log scale
  - outliers by block:
      title: Features of more than 6 times the median norm
      template: by_block
      x: block
      x_label: block
      y:
        metrics/plots/norms.csv: outliers
      y_label: fraction of features

artifacts:
  pruned-model:
    path: models/pruned
    type: model
    desc: The dense model pruned by masks/. It is not cached; `wanda-dvc export DIR --rev NAME` builds any experiment's.
    labels: [pruned, wanda-dvc, causal-lm]
"""


def pipeline() -> str:
    """Return the text of dvc.yaml."""
    stages = {
        stage.run_name(name): _entry(stage, name, part)
        for stage in STAGES.values()
        for name, part in stage.parts.items()
    }
    written, yaml = io.StringIO(), YAML()
    yaml.width = 2**16
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump({"stages": stages}, written)
    return HEAD + written.getvalue() + TAIL


def _entry(stage: Stage, name: str, part: Part) -> dict[str, Any]:
    """Return one stage of dvc.yaml."""

    def named(path: str) -> str:
        return path.replace("{text}", "${key}")

    words = [stage.name, *([name] if name else []), *(["${key}"] if part.by_text else [])]
    entry: dict[str, Any] = {"cmd": f"wanda-dvc {' '.join(words)} --stage-version {stage.version}"}
    if stage.name == "plan":
        entry["params"] = [{"params.yaml": None}]  # all of it
    else:
        entry["deps"] = list(map(named, part.deps))
    # `persist` keeps DVC from storing them for its run cache all the same.
    uncached = [{named(path): {"cache": False, "persist": True}} for path in part.uncached]
    entry["outs"] = [*map(named, part.outs), *uncached]
    if part.metrics:
        entry["metrics"] = [{named(path): {"cache": False}} for path in part.metrics]
    if part.plots:
        entry["plots"] = [
            {named(path): {key: named(value) for key, value in options.items()}} for path, options in part.plots.items()
        ]
    return {"foreach": "${perplexity.texts}", "do": entry} if part.by_text else entry


def ignored(text: str) -> str:
    """Return the text of a .gitignore that names what the stages write, without the metrics."""
    kept = [path for stage in STAGES.values() for part in stage.parts.values() for path in part.written]
    folders = [re.match(r"metrics/(details|plots)|(?!metrics)\w+", path) for path in kept]
    lines = dict.fromkeys(f"/{found[0]}/\n" for found in folders if found)
    return re.sub(r"(?<=metrics themselves are committed\.\n)(/[a-z/]+/\n)+", "".join(lines), text)


if __name__ == "__main__":
    for target in TARGETS:
        target.write_text(pipeline(), encoding="utf-8")
    for target in IGNORES:
        target.write_text(ignored(target.read_text(encoding="utf-8")), encoding="utf-8")
