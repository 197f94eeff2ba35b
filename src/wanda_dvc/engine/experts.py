"""Which stored weights belong to the routed experts of a model, and a view of the model without some experts.

No family-specific code. The number of experts in the configuration is changed for a trial: the tensors whose first
dimension changes with it are the experts' and the router's. A probe then compares the smaller model with the full model
whose router cannot choose the experts that go; a model that fails is refused.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanda_dvc.catalog import Structure
from wanda_dvc.engine.checkpoint import Source
from wanda_dvc.engine.decoder import Decoder
from wanda_dvc.engine.recorder import PRODUCTS
from wanda_dvc.engine.smaller import Cut, Removal, Stays, changed, differences, probe, refused
from wanda_dvc.engine.structure import build_empty, find_blocks, stored_linears, stored_parts
from wanda_dvc.engine.weights import set_parameter
from wanda_dvc.errors import UserError
from wanda_dvc.pruning.units import Mixture, Units

CHOSEN = "num_experts_per_tok"  # of config.json, in every family with experts so far; used in a message


@dataclass(frozen=True, kw_only=True)
class ExpertRemoval(Removal):
    """The routed experts of a model; a set is one block's, or one mixture of several in a block.

    The readers of a set are all linears of its experts.
    """

    expert_of: Mapping[str, int]  # by linear
    apart: Mapping[str, list[list[str]]]  # by set, of experts in tensors of their own: the tensors of each
    routers: tuple[str, ...]  # the parameters and buffers of routers, by the model's names
    groups: int  # groups of neighbouring experts that routers choose from, which stay equally large
    chosen: int | None  # experts a token, if the configuration names the number as most do

    @property
    def about_fields(self) -> str:
        """The change of the number of experts, in words."""
        from_each = f", the same number from each of {self.groups} groups" if self.groups > 1 else ""
        return super().about_fields + from_each

    def fitted(self, stays: Stays) -> "ExpertRemoval":
        """Return the removal that leaves these experts. UserError if the configuration cannot express it."""
        found = super().fitted(stays)
        assert isinstance(found, ExpertRemoval)
        for name, stay in stays.items():
            sizes = stay.view(self.groups, -1).sum(dim=1).tolist()
            if len(set(sizes)) > 1:
                raise UserError(f"keep: masks keep {sizes} experts of the groups of {name}, expected equal numbers")
        if (problem := found.too_few) is not None:
            raise UserError(f"keep: {problem}")
        return found

    def with_stay(self, stay: int) -> "ExpertRemoval":
        """Return the removal that leaves another number of experts."""
        return replace(self, sets={name: units._replace(stay=stay) for name, units in self.sets.items()})

    @property
    def too_few(self) -> str | None:
        """How a router would choose more experts than stay; None if it does not."""
        left = min(units.stay for units in self.sets.values())
        if self.chosen is None or left >= self.chosen:
            return None
        return f"{CHOSEN} is {self.chosen}, expected at most the {left} experts that stay; set a lower sparsity"

    def mask(self, linear: str, keep: Tensor, stays: Stays) -> Tensor:
        """Return the mask of a linear, shaped as `keep`, that removes these experts and nothing else."""
        expert = self.expert_of.get(linear)
        return torch.full_like(keep, expert is None or bool(stays[self.readers[linear]][expert]))

    @cached_property
    def mixtures(self) -> Mapping[str, Mixture]:
        """The linears of each expert, by set."""
        found = {
            name: Mixture([[] for _ in range(units.total)], units.stay, self.groups)
            for name, units in self.sets.items()
        }
        for linear, name in self.readers.items():
            found[name].experts[self.expert_of[linear]].append(linear)
        return found

    def stays(self, keeps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the experts that stay, by set, from the masks of their linears."""
        found: dict[str, Tensor] = {}
        for linear, name in self.readers.items():
            if linear in keeps:
                stay = found.setdefault(name, torch.zeros(self.sets[name].total, dtype=torch.bool))
                stay[self.expert_of[linear]] |= keeps[linear].any()
        return found

    def names(self, where: Collection[str], stays: Stays) -> dict[str, str]:
        """Return the stored tensors of the smaller model, with consecutive experts, and the source's tensor of each."""
        old = {name: name for name in where}
        for name, experts in self.apart.items():
            for tensor in (tensor for tensors in experts for tensor in tensors):
                del old[tensor]
            for number, expert in enumerate(stays[name].nonzero()[:, 0].tolist()):
                old |= dict(zip(experts[number], experts[expert], strict=True))
        return old

    def masked(self, model: Decoder, block: int, stays: Stays) -> AbstractContextManager[object]:
        """Keep routers from choosing experts that go."""
        return Unchoosable(model.model, self, stays)


def find_experts(source: Source, structure: Structure, share: Fraction) -> ExpertRemoval:
    """Return the experts of a model, and how many stay. UserError if it has none, or its probe fails.

    A share that rounds to all experts gives a removal without an effect.
    """
    found, problem = _found(source, structure), ""
    number = next(iter(found.numbers.values()))
    for groups in _groups(source, number):
        stay = min(number, groups * max(1, round(number * (1 - share) / groups)))
        removal = replace(found.with_stay(stay), groups=groups)
        if removal.too_few:
            raise UserError(f"sparsity: {removal.too_few}")
        probed = removal if stay < number else removal.with_stay(number - groups)
        wrong = probe(source, probed, _last_of_each_group(probed))
        if not wrong:
            return removal
        problem = problem or wrong
    raise refused(structure, source, problem)


def _last_of_each_group(removal: ExpertRemoval) -> Stays:
    """Return the experts that stay in the probe. If routers choose from more groups, a smaller router has others."""
    stays = {}
    for name, units in removal.sets.items():
        size, stay = units.total // removal.groups, units.stay // removal.groups
        stays[name] = (torch.arange(size) >= size - stay).repeat(removal.groups)
    return stays


def _groups(source: Source, number: int) -> Iterator[int]:
    """Yield the possible numbers of groups that routers choose experts from: one, and fields of the configuration."""
    text = source.config.get_text_config().to_dict()
    yield 1
    yield from sorted({x for name, x in text.items() if "group" in name and type(x) is int and 1 < x < number})


def _found(source: Source, structure: Structure) -> ExpertRemoval:
    config = source.config
    full = build_empty(config, source.config_name)
    parts = stored_parts(full, source)
    where, _ = find_blocks(full)
    text = config.get_text_config()
    fields = {name: x for name in structure.fields if type(x := text.to_dict().get(name)) is int and x > 1}
    if len(fields) != 1:
        looked = ", ".join(structure.fields)
        several = f"has several numbers of them ({', '.join(fields)})" if fields else f"has none (looked for {looked})"
        raise refused(structure, source, f"its configuration {several}")
    ((field, number),) = fields.items()
    trial = number // 2
    other = build_empty(changed(config, {field: trial}), f"{source.config_name} with {field}={trial}")
    tensors = dict(full.state_dict(keep_vars=True))
    follows: dict[str, int] = {}  # the place of the dimension of experts
    for name, place, size, less in differences(full, other):
        fits = (size, less) == (number, trial) and (place == 0 or tensors[name].dim() < 3)
        if not name.startswith(f"{where}.") or not fits or name not in parts or name in follows:
            raise refused(structure, source, f"{field} also determines {name}")
        follows[name] = place
    # Experts are parameters of three dimensions; a mixture is all below the module around theirs.
    owners = {name.rpartition(".")[0] for name in follows if tensors[name].dim() == 3}
    mixtures = {owner.rpartition(".")[0] for owner in owners}
    if not mixtures:
        raise refused(structure, source, f"{field} determines no tensor of experts")
    set_of = {}
    for name in follows:
        inside = [mixture for mixture in mixtures if name.startswith(f"{mixture}.")]
        if not inside:
            raise refused(structure, source, f"{field} also determines {name}")
        set_of[name] = max(inside, key=len)
    cuts, apart = [], {mixture: [list[str]() for _ in range(number)] for mixture in mixtures}
    for name, dim in follows.items():
        for part in parts[name]:
            if part.expert is None:
                cuts.append(Cut(part.address, dim, set_of[name], (1,)))
            else:
                apart[set_of[name]][part.expert].append(part.address.tensor)
    readers, expert_of = _readers(full, parts, {name: set_of[name] for name in follows if tensors[name].dim() == 3})
    chosen = text.to_dict().get(CHOSEN)
    return ExpertRemoval(
        structure=structure,
        sets={mixture: Units(number, number) for mixture in sorted(mixtures)},
        readers=readers,
        cuts=tuple(cuts),
        numbers={field: number},
        field_of=dict.fromkeys(mixtures, field),
        others={},
        expert_of=expert_of,
        apart={name: experts for name, experts in apart.items() if experts[0]},
        routers=tuple(name for name in follows if name.rpartition(".")[0] not in owners),
        groups=1,
        chosen=chosen if type(chosen) is int else None,
    )


def _readers(model: nn.Module, parts: Any, set_of: Mapping[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """Return the set and the number of the expert of each linear of an expert, by stored name."""
    where, blocks = find_blocks(model)
    names = {id(module): name for name, module in model.named_modules()}
    readers, expert_of = {}, {}
    for index, block in enumerate(blocks):
        for name, linear in stored_linears(block, f"{where}.{index}.", parts.__getitem__).items():
            parameter = f"{names[id(linear.module)]}.{linear.leaf}"
            if linear.part.expert is not None and parameter in set_of:
                readers[name], expert_of[name] = set_of[parameter], linear.part.expert
    return readers, expert_of


class Unchoosable(TorchFunctionMode):
    """Sets the logits of experts that go to −∞ in a loaded model, and what routers add to their scores."""

    def __init__(self, model: nn.Module, removal: ExpertRemoval, stays: Stays) -> None:
        super().__init__()
        self.routers: dict[int, Tensor] = {}  # the experts that go, by the address of a router's weight
        self.added: list[tuple[nn.Module, str, Tensor]] = []
        state = model.state_dict(keep_vars=True)
        for name in removal.routers:
            tensor = state[name]
            gone = next(~stays[x] for x in sorted(stays, key=len, reverse=True) if name.startswith(f"{x}."))
            if tensor.is_meta:  # of a block that is not loaded
                continue
            if min(tensor.shape) > 1 and tensor.dim() == 2:
                self.routers[tensor.data_ptr()] = gone
            else:
                owner, _, leaf = name.rpartition(".")
                self.added.append((model.get_submodule(owner), leaf, gone))

    def __enter__(self) -> Any:
        """Replace what routers add to scores."""
        self._before = [getattr(module, leaf) for module, leaf, _ in self.added]
        for (module, leaf, gone), before in zip(self.added, self._before, strict=True):
            _set(module, leaf, before.masked_fill(gone, -torch.inf))
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        """Put it back."""
        super().__exit__(*error)
        for (module, leaf, _), before in zip(self.added, self._before, strict=True):
            _set(module, leaf, before)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if len(args) >= 2 and function.__name__ in PRODUCTS:
            for weight in args[:2]:
                gone = self.routers.get(weight.data_ptr()) if isinstance(weight, Tensor) else None
                if gone is not None and made.shape[-1:] == gone.shape:
                    return made.masked_fill(gone, -torch.inf)
        return made


def _set(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    if leaf in module._parameters:
        set_parameter(module, leaf, tensor)
    else:
        setattr(module, leaf, tensor)
