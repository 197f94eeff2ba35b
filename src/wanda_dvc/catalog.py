"""The catalog of settings' values: recipes, methods, groups, allocations, reconstructions, statistics and texts.

A row names its function as text, `module:function`, because importing functions imports torch, and `--help` reads this
table. A test imports every function. A package adds a method through an entry point in the group `wanda_dvc.methods`
that names a `Method`.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Literal

from wanda_dvc.errors import SettingError, UserError

ENTRY_POINTS = "wanda_dvc.methods"
Dtype = Literal["float32", "bfloat16", "float16"]  # in which a model runs
STATISTICS = ("norms", "gram", "gradients")  # each includes those before it


@dataclass(frozen=True, kw_only=True)
class Method:
    """A pruning method: the score of weights, and the selection by score."""

    name: str  # as params.yaml writes it
    title: str  # in tables and plots
    citation: str
    link: str
    about: str  # the score, in one line
    # `module:function`: (weight [out, in], InputStats) → score [out, in], higher stays.
    # Of a solver: (weight [out, in], Prepared, share, pattern, group) → Solved.
    function: str
    # The function's input with the weights: nothing, the statistics of the linear's input, or its Gram matrix.
    needs: Literal["weights", "norms", "gram"]
    # experts: the function scores complete experts: (OutputStats) → score; with pattern `experts` alone.
    # groups: every group (a row, a linear, m neighbours) loses the same number of lowest scores.
    # rows: each row loses the same share of its total score, so rows lose different numbers of weights.
    # solver: the function chooses the mask itself, because it changes weights meanwhile.
    competition: Literal["groups", "rows", "solver", "experts", "blocks"]
    # Whether a row's scores depend on the row alone: large matrices are then scored in slices. No default, because a
    # wrong value for a method with sums over columns would give wrong scores on large matrices.
    scores_by_row: bool
    # Of a solver, for patterns that remove units: (weight [out, in], Prepared, Units) → the units that stay. A unit of
    # other methods scores the sum of the scores of the weights that read it.
    units: str = ""
    package: str = ""  # the installed package that the method is from, if not this one

    def __post_init__(self) -> None:
        """Refuse a row with statistics that its function does not receive."""
        if (self.needs == "gram") != (self.competition == "solver"):
            raise ValueError(
                f"method {self.name}: got needs={self.needs} with competition={self.competition}, expected gram with "
                "solver, and with nothing else: only a solver is given Gram matrices, and it is given nothing else"
            )

    def selects_by_row(self, pattern: str, group: str) -> bool:
        """Whether masks of some rows do not depend on the other rows."""
        return self.scores_by_row and self.competition == "groups" and (pattern != "unstructured" or group == "row")

    def needs_inputs(self) -> bool:
        """Whether the scores depend on calibration."""
        return self.needs != "weights"


# Baselines first: reports compare a later method with an earlier one.
_METHODS = (
    Method(
        name="magnitude",
        title="magnitude",
        citation="Han et al. 2015",
        link="https://arxiv.org/abs/1506.02626",
        about="|W|",
        function="wanda_dvc.pruning.scores:magnitude",
        needs="weights",
        competition="groups",
        scores_by_row=True,
    ),
    Method(
        name="wanda",
        title="Wanda",
        citation="Sun et al. 2024",
        link="https://arxiv.org/abs/2306.11695",
        about="|W| · ‖X‖₂",
        function="wanda_dvc.pruning.scores:wanda",
        needs="norms",
        competition="groups",
        scores_by_row=True,
    ),
    Method(
        name="wanda-variant",
        title="Wanda variant",
        citation="Sun et al. 2024, appendix",
        link="https://arxiv.org/abs/2306.11695",
        about="|W| · ‖X‖₂, and each row loses the same share of its total score",
        function="wanda_dvc.pruning.scores:wanda",
        needs="norms",
        competition="rows",
        scores_by_row=True,
    ),
    Method(
        name="ria",
        title="RIA",
        citation="Zhang et al. 2024",
        link="https://openreview.net/forum?id=Tr0lPx9woF",
        about="(|W| over its row's sum + |W| over its column's sum) · ‖X‖₂^½",
        function="wanda_dvc.pruning.scores:ria",
        needs="norms",
        competition="groups",
        scores_by_row=False,
    ),
    Method(
        name="sparsegpt",
        title="SparseGPT",
        citation="Frantar and Alistarh 2023",
        link="https://arxiv.org/abs/2301.00774",
        about="W² over the inverse Gram matrix's diagonal, 128 inputs at a time, later ones updated in between",
        function="wanda_dvc.pruning.solvers:sparsegpt",
        needs="gram",
        competition="solver",
        scores_by_row=False,
        units="wanda_dvc.pruning.units:cheapest",
    ),
    Method(
        name="admm",
        title="ADMM",
        citation="Boža 2024",
        link="https://arxiv.org/abs/2401.02938",
        about="20 alternating updates of mask and weights; the mask grows over the first 15",
        function="wanda_dvc.pruning.solvers:admm",
        needs="gram",
        competition="solver",
        scores_by_row=False,
        units="wanda_dvc.pruning.units:cheapest",
    ),
    Method(
        name="reap",
        title="REAP",
        citation="Lasby et al. 2025",
        link="https://arxiv.org/abs/2510.13999",
        about="of experts: mean over the tokens sent to it of gate · ‖output‖₂",
        function="wanda_dvc.pruning.scores:reap",
        needs="norms",
        competition="experts",
        scores_by_row=False,
    ),
    Method(
        name="influence",
        title="influence",
        citation="Men et al. 2024",
        link="https://arxiv.org/abs/2403.03853",
        about="of blocks: mean over tokens of 1 − cosine of a block's input and output",
        function="wanda_dvc.pruning.scores:influence",
        needs="norms",
        competition="blocks",
        scores_by_row=False,
    ),
)


@cache
def methods() -> dict[str, Method]:
    """Return every method by name: the built-in methods, then those of installed packages.

    UserError for an entry point without a `Method`, or a method with an existing name.
    """
    found = {method.name: method for method in _METHODS}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        where = f"entry point {entry.name} of {entry.dist.name if entry.dist else 'a package'} ({ENTRY_POINTS})"
        try:
            method = entry.load()
        except Exception as error:  # its module may raise any exception
            raise UserError(
                f"{where}: {entry.value} does not load ({error}), expected a wanda_dvc.catalog.Method; "
                "fix or uninstall that package"
            ) from error
        if not isinstance(method, Method):
            raise UserError(
                f"{where}: {entry.value} is a {type(method).__name__}, expected a wanda_dvc.catalog.Method; "
                "fix or uninstall that package"
            )
        if method.name in found:
            raise UserError(f"{where}: method {method.name} exists already, expected another name; rename it there")
        found[method.name] = replace(method, package=entry.dist.name if entry.dist else "")
    return found


# --- models ---


@dataclass(frozen=True)
class Package:
    """A package on the package index: `package:NAME==VERSION`, and with `#sha256=` the hash of its wheel."""

    name: str
    version: str
    sha256: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Package | None":
        """Return the package named by a setting; None for anything but a name and a version, such as an option."""
        from packaging.version import InvalidVersion, Version

        if not (found := _PACKAGE.fullmatch(text)):
            return None
        try:
            Version(found["version"])
        except InvalidVersion:
            return None
        return cls(**found.groupdict())

    @property
    def requirement(self) -> str:
        """The package in pip's form."""
        return f"{self.name}=={self.version}"


# A name by PEP 508, and the characters of a version by PEP 440: no path, no URL, no option.
_PACKAGE = re.compile(
    r"package:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


# --- structures ---


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A kind of units that a pattern removes, so that a smaller dense model remains."""

    name: str  # as params.yaml writes it, for `pattern`
    about: str
    units: str  # what goes, in messages: `of the UNITS`
    fields: tuple[str, ...]  # of config.json: the numbers of units; a model has some of them
    # Widths of up to so many are multiples of the largest power of two that is a 16th of the width or less; wider ones
    # of 64, which kernels like.
    multiple: int
    rounded: str  # what a share is rounded to, in messages
    scaled: tuple[str, ...] = ()  # other fields of config.json that stay in proportion to the number of units
    grouped: bool = False  # a unit is several inputs of its reader, and the field has the number of units
    find: str = "wanda_dvc.engine.finders:find_inputs"  # `module:function`: (source, Structure, share) → Removal
    # The score of units in place of the method of a recipe that calibrates; the weights that stay then keep their
    # values, and statistics are the dense model's.
    method: str = ""


STRUCTURES = {
    structure.name: structure
    for structure in (
        Structure(
            name="neurons",
            about="neurons of each MLP, the same number in all blocks",
            units="neurons of each MLP",
            fields=(
                "intermediate_size",
                "ffn_dim",
                "n_inner",
                "ffn_hidden_size",
                "moe_intermediate_size",
                "shared_expert_intermediate_size",
                "shared_intermediate_size",
            ),
            multiple=64,
            rounded="widths that kernels like",
        ),
        Structure(
            name="heads",
            about="groups of query heads with their key and value head, the same number in all blocks",
            units="groups of attention heads of each block",
            fields=("num_key_value_heads",),
            multiple=1,
            rounded="complete groups",
            scaled=("num_attention_heads",),
            grouped=True,
        ),
        Structure(
            name="experts",
            about="routed experts of each mixture, the same number in all blocks, with their rows of the router",
            units="routed experts of each block",
            fields=("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
            multiple=1,
            rounded="complete experts",
            find="wanda_dvc.engine.finders:find_experts",
            method="reap",
        ),
        Structure(
            name="blocks",
            about="blocks, with all of their weights",
            units="blocks",
            fields=("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
            multiple=1,
            rounded="complete blocks",
            find="wanda_dvc.engine.finders:find_block_units",
            method="influence",
        ),
    )
}


# --- allocations and reconstructions ---


@dataclass(frozen=True, kw_only=True)
class Group:
    """The set of weights that compete with one another, for unstructured patterns."""

    name: str  # as params.yaml writes it
    about: str
    needs: Literal["nothing", "gradients"] = "nothing"


GROUPS = {
    group.name: group
    for group in (
        Group(name="row", about="one output's weights"),
        Group(name="linear", about="the linear's weights"),
        Group(
            name="outputs",
            about="the linear's weights; a row weighs more if the loss depends more on its output",
            needs="gradients",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A rule for the sparsity of each block or linear, given the model's sparsity."""

    name: str  # as params.yaml writes it
    about: str
    function: str  # `module:function`: (sparsity, sizes of the parts, ratings, strength) → the parts' shares
    rating: str  # `module:function`: (weights, BlockStats) → a part's rating
    needs: Literal["nothing", "norms", "gradients"]  # to rate the parts
    strength: float | None = None  # the value of `allocation_strength: null`; None: the allocation has no strength
    strength_is: str = ""
    by_linear: bool = False  # whether the parts are linears instead of blocks; a block then has a rating per linear


ALLOCATIONS = {
    allocation.name: allocation
    for allocation in (
        Allocation(
            name="uniform",
            about="the same sparsity in every block",
            function="",  # without a strength, every part has the model's sparsity
            rating="",
            needs="nothing",
        ),
        Allocation(
            # Yin et al. 2024, arXiv 2310.05175
            name="owl",
            about="the more outlying Wanda scores a block has, the lower its sparsity",
            function="wanda_dvc.pruning.allocation:owl",
            rating="wanda_dvc.pruning.allocation:outlier_rating",
            needs="norms",
            strength=0.08,
            strength_is="λ, half the range of sparsities",
        ),
        Allocation(
            # Fisher information of outputs, as in K-FAC, Martens and Grosse 2015, arXiv 1503.05671
            name="sensitivity",
            about="removes scores below one threshold for all linears; the score is |W| · ‖X‖₂ · √(F / Σ‖X‖²), "
            "with F the Fisher information of the row's weights",
            function="wanda_dvc.pruning.allocation:sensitivity",
            rating="wanda_dvc.pruning.allocation:sensitivity_rating",
            needs="gradients",
            strength=0.2,
            strength_is="the largest difference between a linear's sparsity and the model's; no sparsity is above 0.97",
            by_linear=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """A rule for the values of kept weights."""

    name: str  # as params.yaml writes it
    about: str
    # `module:function`: (weight [out, in], keep, Prepared[, the Gram matrix of its output's gradients]) → Solved; None:
    # kept weights do not change.
    function: str | None
    kept: str  # a model card's words on kept weights, and on weights outside linears
    by_gradients: bool = False  # whether it receives the Gram matrices of gradients
    trains: bool = False  # each block is then trained on its mask


RECONSTRUCTIONS = {
    reconstruction.name: reconstruction
    for reconstruction in (
        Reconstruction(
            name="none",
            about="unchanged",
            function=None,
            kept="Nothing was trained afterwards: all other weights are the dense model's, bit for bit.",
        ),
        Reconstruction(
            # Meng et al. 2024, ALPS, arXiv 2406.07831
            name="least-squares",
            about="least squares by conjugate gradients: the output of each linear closest to the dense output",
            function="wanda_dvc.pruning.solvers:least_squares",
            kept="The other weights of each linear were solved for, so that its output on the calibration text comes "
            "near the dense one; nothing was trained. Embeddings, norms and output head are the dense model's, bit for "
            "bit.",
        ),
        Reconstruction(
            # van der Ouderaa et al. 2024, LLM Surgeon, arXiv 2312.17244
            name="output-weighted",
            about="least squares, weighted by gradients of the loss; rows compensate for each other",
            function="wanda_dvc.pruning.solvers:fisher_least_squares",
            kept="The other weights of each linear were solved for, so that the model's loss on the calibration text "
            "changes little; nothing was trained. Embeddings, norms and output head are the dense model's, bit for "
            "bit.",
            by_gradients=True,
        ),
        Reconstruction(
            # Frantar and Alistarh 2023, arXiv 2301.00774
            name="sparsegpt",
            about="input by input: the weights to the right compensate for each removed weight",
            function="wanda_dvc.pruning.solvers:sparsegpt_update",
            kept="The other weights of each linear were updated while weights were removed; nothing was trained. "
            "Embeddings, norms and output head are the dense model's, bit for bit.",
        ),
        Reconstruction(
            # arXiv 2510.14444
            name="blockwise",
            about="least squares, then a short training of each block towards the dense block's output (with "
            "`propagation` `corrected` or `pruned`)",
            function="wanda_dvc.pruning.solvers:least_squares",
            kept="Each block was then trained on the calibration text, so that its output comes near the dense block's."
            " Embeddings and output head are the dense model's, bit for bit.",
            trains=True,
        ),
    )
}
# Where complete inputs go, one solution is the best for all outputs, so all solvers become this one.
SOLVED_UNITS = Reconstruction(
    name="least-squares",
    about="least squares: the output of each linear that reads removed units closest to the dense output",
    function="wanda_dvc.pruning.units:least_squares",
    kept="The linears that read removed units were solved for, so that their output on the calibration text comes near "
    "the dense one; nothing was trained. Embeddings, norms and output head are the dense model's, bit for bit.",
)


# --- recipes ---


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named set of choices: one word of params.yaml in place of five."""

    name: str  # as params.yaml writes it
    about: str
    method: str
    group: str = "row"
    allocation: str = "uniform"
    reconstruction: str = "none"
    propagation: str = "dense"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="magnitude",
            about="removes the smallest weights of each linear: the paper's magnitude baseline",
            method="magnitude",
            group="linear",
        ),
        Recipe(name="magnitude-rows", about="removes the smallest weights of each row", method="magnitude"),
        Recipe(name="wanda", about="removes the lowest |W| · ‖X‖₂ of each row", method="wanda"),
        Recipe(
            name="wanda-refit",
            about="Wanda's masks; least squares gives the remaining weights new values",
            method="wanda",
            reconstruction="least-squares",
        ),
        Recipe(
            name="sparsegpt",
            about="SparseGPT's masks and weights; its authors also have `propagation: pruned`",
            method="sparsegpt",
            group="linear",
            reconstruction="sparsegpt",
        ),
        Recipe(
            name="admm",
            about="ADMM's masks; least squares gives the remaining weights new values",
            method="admm",
            reconstruction="least-squares",
        ),
        Recipe(
            name="fisher",
            about="ADMM; gradients of the loss decide masks, sparsities and new weights",
            method="admm",
            group="outputs",
            allocation="sensitivity",
            reconstruction="output-weighted",
        ),
        Recipe(
            name="blockwise",
            about="ADMM's masks; then a short training of each block towards the dense block's outputs",
            method="admm",
            group="outputs",
            allocation="sensitivity",
            reconstruction="blockwise",
            propagation="corrected",
        ),
        Recipe(
            name="wanda-paper",
            about="the paper's procedure: Wanda calibrated on pruned blocks",
            method="wanda",
            propagation="pruned",
        ),
    )
}

# --- texts ---

# A model on the Hub: an owner's name, one slash, and perhaps @ and a revision.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/\w[\w.\-]*(@\w[\w.\-/]*)?")
# A data set on the Hub: the same, and before @ perhaps a configuration.
HUB_TEXT = re.compile(
    r"(?P<dataset>[A-Za-z0-9][\w.\-]*/\w[\w.\-]*)(:(?P<config>\w[\w.\-]*))?(@(?P<revision>\w[\w.\-/]*))?"
)


@dataclass(frozen=True)
class NamedText:
    """A data set of text, its configuration, its splits, and how its rows are joined."""

    dataset: str
    config: str | None
    column: str
    splits: tuple[str, ...] = ("train", "validation", "test")
    evaluated: str = "test"  # the split that perplexity is measured on
    join: str = "\n\n"  # between two rows, for perplexity
    revision: str | None = None  # None: its main branch
    # One file a split, for a data set too large to fetch completely. Its rows are documents: calibration draws windows
    # within documents, as the Wanda authors do, and does not join them.
    shards: dict[str, str] = field(default_factory=dict)


TEXTS = {
    "wikitext2": NamedText("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": NamedText(
        "allenai/c4",
        None,
        "text",
        splits=("train", "validation"),
        evaluated="validation",
        join=" ",
        shards={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    # Its main branch is a script, which never runs here; the Hub has its rows as Parquet on another branch.
    "ptb": NamedText(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", join=" ", revision="refs/convert/parquet"
    ),
}
EMBEDDED_TEXT = "embedded"
EMBEDDED_SPLITS = ("train", "test")
NAMED_TEXTS = (EMBEDDED_TEXT, *TEXTS)


def function_of(row: str) -> Callable[..., Any]:
    """Return the function that a row of the catalog names as `module:function`."""
    module, _, name = row.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (2, 4) for `"2:4"`: 2 of every 4 neighbours stay. None for a pattern without neighbours."""
    n, colon, m = pattern.partition(":")
    return (int(n), int(m)) if colon else None


def check_pattern(pattern: str, inputs: dict[str, int]) -> None:
    """Raise SettingError where a linear's number of inputs is no multiple of m."""
    if n_of_m := parse_pattern(pattern):
        odd = [f"{name} has {size} inputs" for name, size in inputs.items() if size % n_of_m[1]]
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise SettingError(
                f"pattern: got {pattern}, but {odd[0]}{more}, expected a multiple of {n_of_m[1]}; choose another m"
            )
