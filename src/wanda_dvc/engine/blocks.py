"""The blocks of a model as units, and a view of the model without some blocks.

No family-specific code. Stored names are renumbered, and lists with an entry for each block lose the same entries. A
probe compares each block of the smaller model with the same block of the full model.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from wanda_dvc.catalog import Structure
from wanda_dvc.engine.checkpoint import Source
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.rows import Row
from wanda_dvc.engine.smaller import Output, Removal, Stays, block_lists, probe, refused
from wanda_dvc.engine.structure import build_empty, find_blocks, stored_linears, stored_parts
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.units import Units, stay_of


@dataclass(frozen=True, kw_only=True)
class BlockRemoval(Removal):
    """The blocks of a model; a set is one block, and its readers are all linears of the block."""

    stay: int
    lists: Mapping[str, list[Any]]  # the configuration's lists with an entry for each block
    close = 1e-3  # the same weights run: a block that depends on the number of blocks differs a little

    @property
    def by_block(self) -> bool:
        """Whether the units are blocks."""
        return True

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """The number of blocks in the configuration, before and after."""
        return {name: (before, self.stay) for name, before in self.numbers.items()}

    @property
    def share(self) -> float:
        """The share of the blocks that go."""
        return 1 - self.stay / len(self.sets)

    @property
    def changes(self) -> dict[str, Any]:
        """The new values in the configuration."""
        kept = [bool(units.stay) for units in self.sets.values()]
        lists = {name: [x for x, stays in zip(row, kept, strict=True) if stays] for name, row in self.lists.items()}
        return {name: after for name, (_, after) in self.fields.items()} | lists

    def fitted(self, stays: Stays) -> "BlockRemoval":
        """Return the removal that leaves these blocks. UserError if none stays."""
        sets = {name: Units(1, int(stays[name].sum())) for name in self.sets}
        if not (stay := sum(units.stay for units in sets.values())):
            raise UserError("keep: masks keep no block, expected one or more")
        return replace(self, sets=sets, stay=stay)

    def chosen(self, source: Source, stays: Bool[Tensor, " blocks"]) -> "BlockRemoval":
        """Return the removal that leaves these blocks. UserError if the smaller model computes something else."""
        by_set = dict(zip(self.sets, stays.view(-1, 1), strict=True))
        removal = self.fitted(by_set)
        if problem := probe(source, removal, by_set):
            raise refused(self.structure, source, problem)
        return removal

    def stays(self, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whether blocks stay, by set, from the masks of their linears."""
        found: dict[str, Tensor] = {}
        for linear, name in self.readers.items():
            if linear in keeps:
                found[name] = found.get(name, torch.zeros(1, dtype=torch.bool)) | keeps[linear].any()
        return found

    def mask(self, linear: str, keep: Tensor, stays: Stays) -> Tensor:
        """Return the mask of a linear, shaped as `keep`, that removes these blocks and nothing else."""
        return torch.full_like(keep, bool(stays[self.readers[linear]]))

    def order(self, count: int) -> list[int]:
        """Return the blocks that stay, of `count` blocks."""
        return [index for index, units in enumerate(self.sets.values()) if units.stay]

    def outputs(self, model: Decoder, hidden: Tensor, row: Row, stays: Stays) -> Iterator[tuple[int, Output]]:
        """Yield what each block that stays computes from the output of the one before it, by its new index."""
        for new, old in enumerate(self.order(len(self.sets))):
            with model.block(old, then=-1):
                after = model.run(old, hidden, row)
            yield new, Output(hidden, hidden, after)
            hidden = after

    def names(self, where: Collection[str], stays: Stays) -> dict[str, str]:
        """Return the stored tensors of the smaller model, with consecutive blocks, and the source's tensor of each."""
        leaf = next(iter(self.sets)).rpartition(".")[0].rpartition(".")[2]
        block = re.compile(rf"((?:^|\.){re.escape(leaf)}\.)(\d+)(?=\.)")
        # Another part of the model, such as a vision tower, may have blocks of the same leaf name.
        own = {linear[: found.end(1)] for linear in self.readers if (found := block.search(linear))}
        after = {old: new for new, old in enumerate(self.order(len(self.sets)))}
        names = {}
        for name in where:
            found = block.search(name)
            if found is None or name[: found.end(1)] not in own:
                names[name] = name
            elif (index := int(found[2])) in after or index >= len(self.sets):  # those after the last one predict more
                number = after.get(index, index - len(self.sets) + self.stay)
                names[f"{name[: found.start()]}{found[1]}{number}{name[found.end() :]}"] = name
        return names


def find_block_units(source: Source, structure: Structure, share: Fraction) -> BlockRemoval:
    """Return the blocks of a model, and how many stay; `chosen` says which. UserError if no field has their number."""
    full = build_empty(source.config, source.config_name)
    where, blocks = find_blocks(full)
    parts, text = stored_parts(full, source), source.config.get_text_config()
    content, names = text.to_dict(), {}
    fields = {name: len(blocks) for name in structure.fields if content.get(name) == len(blocks)}
    if not fields:
        raise refused(structure, source, f"its configuration has no number of them ({', '.join(structure.fields)})")
    for index, block in enumerate(blocks):
        for name in stored_linears(block, f"{where}.{index}.", parts.__getitem__):
            names[name] = f"{where}.{index}"
    return BlockRemoval(
        structure=structure,
        sets={f"{where}.{index}": Units(1, 1) for index in range(len(blocks))},
        readers=names,
        cuts=(),
        numbers=fields,
        field_of={f"{where}.{index}": next(iter(fields)) for index in range(len(blocks))},
        others={},
        stay=stay_of(len(blocks), share, structure.multiple),
        lists=block_lists(text, len(blocks)),
    )
