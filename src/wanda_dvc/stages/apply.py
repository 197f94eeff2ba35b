"""Write the pruned model: the dense checkpoint, byte for byte, with zeros where the masks say so."""

import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wanda_dvc.engine.checkpoint import Checkpoint
from wanda_dvc.engine.costs import DISK, HOST, Cost, Setting
from wanda_dvc.engine.sizes import Need, writing
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages.inputs import largest
from wanda_dvc.stages.running import progress
from wanda_dvc.study.files import Json, write_csv, write_json
from wanda_dvc.study.project import Project
from wanda_dvc.study.provenance import PROVENANCE, digest, read_provenance, write_provenance
from wanda_dvc.study.tensors import block_count, read_masks

CARD = """\
---
library_name: transformers
tags: [pruned, wanda-dvc]
---
# {source}, pruned

{percent:g} % of the weights in the linear layers of every block are zero; embeddings, norms and output head are
unchanged.

| what | value |
| --- | --- |
| dense model | `{source}` |
| method | `{method}` |
| sparsity | {sparsity:g}, measured {measured:.6f} |
| pattern | `{pattern}`{group} |
| calibration | {samples} windows of {length} tokens of {text}, seed {seed}, {dtype} |

The zeros are stored like any other number: this makes the files no smaller and, without kernels for the pattern, no
hardware faster.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```
"""


class Zeros(NamedTuple):
    """How many of a linear's weights are zero, and how many there are; and what they take when dense."""

    block: int
    zero: int
    size: int
    nbytes: int


def apply(*, project: Project) -> str:
    """models/dense + masks/ → models/pruned"""
    checkpoint = Checkpoint(project.model("dense"))
    made_from = check_masks(checkpoint, project.masks)
    with project.work(made_from) as work:
        zeros = prune(checkpoint, project.masks, work.fresh())
        work.publish(project.model("pruned"))
        write_json(project.metrics("pruned", "sparsity"), {"sparsity": round(measured_sparsity(zeros), 6)})
        write_json(
            project.details("pruned", "sparsity"),
            {linear: round(found.zero / found.size, 6) for linear, found in zeros.items()},
        )
        write_csv(
            project.plots("sparsity"),
            ["block", "linear", "weights", "zeros", "sparsity", "bytes"],
            ([x.block, linear, x.size, x.zero, x.zero / x.size, x.nbytes] for linear, x in zeros.items()),
        )
    masks: str = made_from["masks"]
    return masks


def need(project: Project, _: str | None = None) -> Need:
    """The masks of a block, a linear at work, and the files of another model."""
    folder = project.model("dense")
    if not (folder / "config.json").is_file():
        return Need()
    block, linear = largest(project)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Need(writing(block=block, linear=linear), disk=size, least=size)


def cost(params: Params, on: Setting) -> Cost:
    """Copied to the disk, then read, multiplied and counted."""
    model = on.model
    seconds = model.stored / DISK + on.work.linears * (4 * on.stored_width + 1) / HOST
    return Cost(0, model.stored, 0, model.stored, writing(block=model.block, linear=model.linear), seconds)


def check_masks(checkpoint: Checkpoint, masks: Path) -> Json:
    """What a model pruned by these masks is made from. UserError if they are another model's."""
    dense, made = read_provenance(checkpoint.folder, "download model"), read_provenance(masks, "mask")
    if made["model"]["sha256"] != dense["sha256"]:
        raise UserError(
            f"masks/: made for {made['model']['source']}, expected {dense['source']}, the model in models/dense; "
            "run `dvc repro` or `wanda-dvc mask`"
        )
    # What the masks say and no more: versions of this run's libraries would make other bytes of the same model.
    return made | {"kind": "model", "masks": digest(made)}


def prune(checkpoint: Checkpoint, masks: Path, target: Path) -> dict[str, Zeros]:
    """Write the pruned checkpoint, its card and its provenance into an empty folder; by linear, what is zero now."""
    made_from = check_masks(checkpoint, masks)
    skipped = shutil.ignore_patterns(PROVENANCE, "README.md")
    shutil.copytree(checkpoint.folder, target, ignore=skipped, copy_function=shutil.copyfile, dirs_exist_ok=True)
    places = {
        name: (target / shard.name, stored, shape, begin)
        for shard in checkpoint.shards
        for name, stored, shape, begin, _ in checkpoint.bytes_at(shard)
    }
    zeros: dict[str, Zeros] = {}
    blocks = block_count(masks)
    for block in progress(range(blocks), total=blocks, what="apply, blocks"):
        for linear, keep in read_masks(masks, block).items():
            tensor, expert = checkpoint.find(linear)
            path, stored, shape, begin = places[tensor]
            # As unsigned integers: a weight that stays keeps its bits, whatever the dtype.
            bits = np.dtype({"F64": "u8", "F32": "u4", "BF16": "u2", "F16": "u2"}[stored])
            if expert is not None:  # one of several that lie one after the other
                shape = shape[1:]
                begin += expert * math.prod(shape) * bits.itemsize
            if tuple(shape) != tuple(keep.shape):
                raise UserError(f"masks/: {linear} is {list(keep.shape)}, expected {shape}; run `wanda-dvc mask` again")
            weight = np.memmap(path, bits, "r+", offset=begin, shape=tuple(shape))
            np.multiply(weight, keep.numpy(), out=weight)
            magnitude = weight & bits.type(2 ** (8 * bits.itemsize - 1) - 1)
            zero = int(weight.size - np.count_nonzero(magnitude))
            zeros[linear] = Zeros(block, zero, weight.size, weight.nbytes)
    params, calibration, measured = made_from["params"], made_from["calibration"], measured_sparsity(zeros)
    card = CARD.format(
        source=read_provenance(checkpoint.folder, "download model")["source"],
        percent=round(100 * measured, 2),
        measured=measured,
        method=params["method"],
        sparsity=params["sparsity"],
        pattern=params["pattern"],
        group=f", compared within a {params['group']}" if params["pattern"] == "unstructured" else "",
        text=calibration["text"]["source"],
        **{name: calibration[name] for name in ("samples", "length", "seed", "dtype")},
    )
    (target / "README.md").write_text(card, encoding="utf-8")
    write_provenance(target, made_from)
    return zeros


def measured_sparsity(zeros: dict[str, Zeros]) -> float:
    """The fraction of the linears' weights that are zero."""
    return sum(found.zero for found in zeros.values()) / sum(found.size for found in zeros.values())
