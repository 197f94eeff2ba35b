"""Write the pruned model: the dense checkpoint, byte for byte, with zeros where the masks don't keep a weight."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wanda_dvc.engine.checkpoint import Address, Checkpoint
from wanda_dvc.engine.costs import DISK, HOST, Cost, Setting
from wanda_dvc.engine.sizes import Need, writing
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params
from wanda_dvc.stages.inputs import largest
from wanda_dvc.stages.running import progress
from wanda_dvc.study.files import Json, write_csv, write_json
from wanda_dvc.study.markup import code, inline
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
| dense model | {source_code} |
| method | {method} |
| sparsity | {sparsity:g}, measured {measured:.6f} |
| pattern | {pattern}{group} |
| calibration | {samples} windows of {length} tokens of {text}, seed {seed}, {dtype} |

The zeros are stored like any other number: this makes the files no smaller and, without kernels for the pattern, no
hardware faster.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```
"""


class Zeros(NamedTuple):
    """The zeros of one linear."""

    block: int
    zero: int
    size: int  # weights, zeros included
    nbytes: int  # of all weights, zeros included


def apply(*, project: Project) -> None:
    """Run the stage: models/dense + masks/ → models/pruned."""
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


def need(project: Project, _: str | None = None) -> Need:
    """A linear at work, and the files of another model."""
    folder = project.model("dense")
    if not (folder / "config.json").is_file():
        return Need()
    linear = largest(project)[1]
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Need(writing(linear=linear), disk=size, least=size)


def cost(params: Params, on: Setting) -> Cost:
    """Copied to the disk, then read, multiplied and counted."""
    model = on.model
    seconds = model.stored / DISK + on.work.linears * (4 * on.stored_width + 1) / HOST
    return Cost(0, model.stored, 0, model.stored, writing(linear=model.linear), seconds)


def check_masks(checkpoint: Checkpoint, masks: Path) -> Json:
    """The provenance of a model pruned by these masks. UserError if the masks were made for another model."""
    dense, made = read_provenance(checkpoint.folder, "download model"), read_provenance(masks, "mask")
    if made["model"]["sha256"] != dense["sha256"]:
        raise UserError(
            f"masks/: made for {made['model']['source']}, expected {dense['source']}, the model in models/dense; "
            "run `dvc repro` or `wanda-dvc mask`"
        )
    # Only what the masks record: with this run's library versions, the same model would have other bytes.
    described = {name: value for name, value in made.items() if name not in ("blocks", "files")}
    return described | {"kind": "model", "masks": digest(made)}


def prune(checkpoint: Checkpoint, masks: Path, target: Path) -> dict[str, Zeros]:
    """Write the pruned checkpoint, its card and its provenance into an empty folder; returns the zeros by linear."""
    made_from = check_masks(checkpoint, masks)
    by_block = [read_masks(masks, block) for block in range(block_count(masks, "mask"))]
    blocks = {linear: block for block, keeps in enumerate(by_block) for linear in keeps}
    found: dict[str, Zeros] = {}

    def pruned(address: Address) -> Tensor:
        linear, weight = address.linear, checkpoint.read(address)
        keep = by_block[blocks[linear]][linear]
        if weight.shape != keep.shape:
            raise UserError(
                f"masks/: {linear} is {list(keep.shape)}, expected {list(weight.shape)}; run `wanda-dvc mask` again"
            )
        # As unsigned integers: kept weights keep their bits in every dtype, and removed ones become +0.
        bits = weight.view(getattr(torch, f"uint{8 * weight.itemsize}")).numpy() * keep.numpy()
        minus_zero = 1 << (8 * weight.itemsize - 1)  # a zero too
        zero = weight.numel() - int(np.count_nonzero(bits)) + int(np.count_nonzero(bits == minus_zero))
        found[linear] = Zeros(blocks[linear], zero, weight.numel(), weight.nbytes)
        return torch.from_numpy(bits).view(weight.dtype)

    addresses = [checkpoint.find(linear) for linear in blocks]
    written = checkpoint.copy(target, addresses, pruned, without=(PROVENANCE, "README.md"))
    for _ in progress(written, total=len(addresses), what="apply, linears"):
        pass
    zeros = {linear: found[linear] for linear in blocks}
    params, calibration, measured = made_from["params"], made_from["calibration"], measured_sparsity(zeros)
    source = read_provenance(checkpoint.folder, "download model")["source"]
    card = CARD.format(
        source=inline(source),
        source_code=code(source),
        percent=round(100 * measured, 2),
        measured=measured,
        method=code(params["method"]),
        sparsity=params["sparsity"],
        pattern=code(params["pattern"]),
        group=f", compared within a {params['group']}" if params["pattern"] == "unstructured" else "",
        text=inline(calibration["text"]["source"]),
        **{name: calibration[name] for name in ("samples", "length", "seed", "dtype")},
    )
    (target / "README.md").write_text(card, encoding="utf-8")
    write_provenance(target, made_from)
    return zeros


def measured_sparsity(zeros: dict[str, Zeros]) -> float:
    """The fraction of the linears' weights that are zero."""
    return sum(found.zero for found in zeros.values()) / sum(found.size for found in zeros.values())
