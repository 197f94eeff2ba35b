"""The catalog of settings' values: recipes, methods, groups, allocations, reconstructions, statistics and texts.

A row names its function as text, `module:function`, because importing functions imports torch, and `--help` reads this
table. A test imports every function. A package adds a method through an entry point in the group `wanda_dvc.methods`
that names a `Method`.
"""

import importlib.util
import re
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, Literal

from wanda_dvc.errors import UserError, reason

ENTRY_POINTS = "wanda_dvc.methods"
STATISTICS = ("norms", "gram", "fisher")  # each includes those before it


@dataclass(frozen=True)
class Choice:
    """A value of a setting."""

    name: str  # as params.yaml writes it
    about: str  # in one line
    paper: str = field(default="", kw_only=True)  # a link in Markdown


# --- methods ---


@dataclass(frozen=True, kw_only=True)
class Method(Choice):
    """A pruning method: the score of weights, and the selection by score."""

    paper: str
    # `module:function`: (weight [out, in], InputStats) → score [out, in]; the highest are kept.
    # Of a solver: (weight [out, in], GramFactors, sparsity, pattern, group) → mask [out, in]; True is kept.
    # Of a method that needs `blocks`: (DepthChoice, measure) → DepthChoice with one block more.
    # "": the package that has it is not installed; masks of the method can still be applied.
    function: str
    # What it reads in addition: nothing, an InputStats, the Gram matrix, or measured choices of blocks.
    # With the Gram matrix it is a solver: it returns the mask, because it changes weights before all are chosen.
    needs: Literal["weights", "norms", "gram", "blocks"]
    # The patterns whose units the function scores, such as experts from a TokenSum; (): it scores weights.
    patterns: tuple[str, ...] = ()
    # Whether a row's scores depend on the row alone: large matrices are then scored in slices, which takes less memory.
    scores_by_row: bool = False
    package: str = ""  # the installed package that the method is from, if not this one

    @property
    def file(self) -> str:
        """The file with the function of a package, for `plan`: an edit changes masks. `none` of a built-in method.

        UserError if the module is missing.
        """
        if not self.package:
            return "none"
        module = self.function.partition(":")[0]
        spec, problem = None, "not found"
        try:
            spec = importlib.util.find_spec(module)  # imports the packages around the module
        except Exception as error:  # a package may raise any
            problem = f"{type(error).__name__}: {reason(error)}"
        if spec is None:
            raise UserError(f"method {self.name}: {module} of {self.package}: {problem}; reinstall the package")
        return spec.origin or "none"

    @property
    def is_solver(self) -> bool:
        """Whether the function returns a mask, from the Gram matrix of the inputs, in place of scores."""
        return self.needs == "gram"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function. UserError, with the method's name, for an error in a package's function."""
        try:
            return resolve_name(self.function)(*args, **kwargs)
        except Exception as error:  # a package may raise any
            if not self.package or isinstance(error, UserError):
                raise
            where = f"method {self.name}: {self.function} of {self.package}"
            raise UserError(f"{where}: {type(error).__name__}: {reason(error)}; correct the function") from error

    def selects_by_row(self, pattern: str, group: str) -> bool:
        """Whether each row's mask depends on that row alone."""
        return self.scores_by_row and (pattern != "unstructured" or group == "row")


# Baselines first: reports compare a later method with an earlier one.
_METHODS = {row.name: row for row in (
    Method("magnitude", "|W|", paper="[Han et al. 2015](https://arxiv.org/abs/1506.02626)", needs="weights",
           function="wanda_dvc.pruning.scores:magnitude", scores_by_row=True),
    Method("wanda", "|W| · ‖X‖₂", paper="[Sun et al. 2024](https://arxiv.org/abs/2306.11695)", needs="norms",
           function="wanda_dvc.pruning.scores:wanda", scores_by_row=True),
    Method("ria", "(|W| over its row's sum + |W| over its column's sum) · ‖X‖₂^½", needs="norms",
           paper="[Zhang et al. 2024](https://openreview.net/forum?id=Tr0lPx9woF)",
           function="wanda_dvc.pruning.scores:ria"),
    Method("sparsegpt", needs="gram", function="wanda_dvc.pruning.solvers:sparsegpt",
           about="W² over the inverse Gram matrix's diagonal, 128 inputs at a time, later ones updated in between",
           paper="[Frantar and Alistarh 2023](https://arxiv.org/abs/2301.00774)"),
    Method("admm", "15 alternating updates of mask and weights; each time, the mask prunes more", needs="gram",
           paper="[Boža 2024](https://arxiv.org/abs/2401.02938)", function="wanda_dvc.pruning.solvers:admm"),
    Method("reap", "experts only: mean of gate · ‖output‖₂ over routed tokens", needs="norms", patterns=("experts",),
           paper="[Lasby et al. 2025](https://arxiv.org/abs/2510.13999)", function="wanda_dvc.pruning.scores:reap"),
    Method("divergence", "blocks only: KL(dense ‖ without the blocks) of the predictions, measured block after block",
           paper="[Song et al. 2024](https://arxiv.org/abs/2402.09025)", needs="blocks",
           function="wanda_dvc.engine.depth:choose_one_more", patterns=("blocks",)),
)}  # fmt: skip


@cache
def methods() -> dict[str, Method]:
    """Return the built-in methods, then those of packages, by name. UserError for an entry point that is no method."""
    rows = dict(_METHODS)
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        package = entry.dist.name if entry.dist else "a package"
        where = f"entry point {entry.name} of {package} ({ENTRY_POINTS}): {entry.value}"
        try:
            method = replace(entry.load(), package=package)
            problem = ""
            if method.name in rows:
                problem = f"has the taken name {method.name}, expected another"
            elif method.needs == "blocks":  # this package finds and measures them
                problem = "needs blocks, expected weights, norms or gram"
        except Exception as error:  # its module may raise any exception, and `replace` refuses other objects
            problem = f"does not load as a method ({error}), expected a wanda_dvc.catalog.Method"
        if problem:
            raise UserError(f"{where} {problem}; fix or uninstall that package")
        rows[method.name] = method
    return rows


# --- structures ---


@dataclass(frozen=True, kw_only=True)
class Structure(Choice):
    """A kind of units that a pattern removes, so that a smaller dense model remains; `about` names the units."""

    fields: tuple[str, ...]  # of config.json: the numbers of units; a model has some of them
    # Of a kept width, at most: llama.cpp's K-quants need rows of 256 weights.
    multiple: int = 1
    scaled: tuple[str, ...] = ()  # more fields, in proportion to units: query heads follow their key-value heads
    find: str = "wanda_dvc.engine.finders:find_input_units"  # (source, Structure, sparsity, device) → Removal
    method: str = ""  # scores units of complete linears, in place of a recipe's; "": units are inputs


STRUCTURES = {row.name: row for row in (
    Structure("neurons", "neurons of each MLP", multiple=256,
              fields=("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "moe_intermediate_size",
                      "shared_expert_intermediate_size", "shared_intermediate_size")),
    Structure("heads", "groups of attention heads of each block", fields=("num_key_value_heads",),
              scaled=("num_attention_heads",)),
    Structure("experts", "routed experts of each block", find="wanda_dvc.engine.finders:find_experts", method="reap",
              fields=("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
                      "num_routed_experts")),
    Structure("blocks", "blocks", find="wanda_dvc.engine.finders:find_block_units", method="divergence",
              fields=("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
    Structure("smaller", "parameters in blocks, heads and neurons", fields=(),
              find="wanda_dvc.engine.finders:find_smaller"),
)}  # fmt: skip


# --- groups, allocations and reconstructions ---

# The weights that compete with one another, for unstructured patterns. `outputs` reads stats/fisher.
GROUPS = {
    "row": "one output's weights",
    "linear": "the linear's weights",
    "outputs": "the linear's weights; a row, or a neuron or head, weighs more if the loss depends more on its output",
}
PROPAGATIONS = {
    "dense": "each block is calibrated on the outputs of dense blocks, which are cached",
    "pruned": "on the outputs of the pruned blocks before it, as in the paper",
}


@dataclass(frozen=True, kw_only=True)
class Allocation(Choice):
    """A rule for the sparsity of each block or linear, given the model's sparsity."""

    # `module:function`: (sparsity, sizes of the blocks, ratings, strength) → the blocks' sparsities, to which the same
    # constant is added; "": all equal
    function: str = ""
    rating: str = ""  # `module:function`: (weights, BlockStats) → a list with the block's rating
    uses_fisher: bool = False  # whether the rating needs stats/fisher; each linear then has a rating and a sparsity
    strength: float | None = None  # how far sparsities differ, as the function defines it; None: they are equal


ALLOCATIONS = {row.name: row for row in (
    Allocation("uniform", "the same sparsity in every block"),
    Allocation("owl", function="wanda_dvc.pruning.allocation:owl", strength=0.08,
               paper="[Yin et al. 2024](https://arxiv.org/abs/2310.05175)",
               rating="wanda_dvc.pruning.allocation:outlier_rating",
               about="the more outlying Wanda scores a block has, the lower its sparsity; they differ by up to 0.16 "
               "(λ = 0.08)"),
    # Fisher information of outputs, as in K-FAC
    Allocation("sensitivity", function="wanda_dvc.pruning.allocation:sensitivity", uses_fisher=True, strength=0.2,
               paper="[Martens and Grosse 2015](https://arxiv.org/abs/1503.05671)",
               rating="wanda_dvc.pruning.allocation:sensitivity_rating",
               about="one threshold for all linears; |W| · ‖X‖₂ counts by the Fisher information of its row; a "
               "linear's sparsity: the model's ± 0.2, at most 0.97"),
)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Choice):
    """A rule for the values of kept weights."""

    # `module:function`: (weight [out, in], mask, GramFactors[, gradient_gram][, steps]) → new weights; None: kept
    # weights do not change.
    function: str | None = None
    uses_fisher: bool = False  # whether it receives `gradient_gram`, the Gram matrix of its output's gradients
    steps: int = 0  # of conjugate gradients; 0: another solver
    steps_n_of_m: int = 0  # likewise with patterns n:m, if they have their own


RECONSTRUCTIONS = {row.name: row for row in (
    Reconstruction("none", "unchanged"),
    Reconstruction("least-squares", function="wanda_dvc.pruning.solvers:least_squares", steps=10,
                   paper="[Meng et al. 2024](https://arxiv.org/abs/2406.07831)",  # ALPS
                   about="least squares by conjugate gradients: the output of each linear closest to the dense output"),
    # As LLM Surgeon; it starts from the weights of `least-squares`. With n:m it converges more slowly:
    # dev/decisions/0028-fisher-least-squares.md.
    Reconstruction("output-weighted", function="wanda_dvc.pruning.solvers:fisher_least_squares", uses_fisher=True,
                   steps=15, steps_n_of_m=30, paper="[van der Ouderaa et al. 2024](https://arxiv.org/abs/2312.17244)",
                   about="least squares, weighted by gradients of the loss; rows compensate for each other"),
    Reconstruction("sparsegpt", function="wanda_dvc.pruning.solvers:sparsegpt_update",
                   paper="[Frantar and Alistarh 2023](https://arxiv.org/abs/2301.00774)",
                   about="input by input: the weights to the right compensate for each removed weight"),
)}  # fmt: skip
# Where complete inputs are removed, one solution is the best for all outputs, so all solvers become this one.
SOLVED_UNITS = Reconstruction(
    "least-squares",
    "least squares: the output of each linear that reads removed units closest to the dense output",
    function="wanda_dvc.pruning.units:least_squares_of_units",
)
# `mask` runs it, by `engine.repair`; this row describes it.
REPAIR = Reconstruction("least-squares", "least squares: the last linears of blocks take over what removed blocks add")


# --- recipes ---


@dataclass(frozen=True)
class Recipe(Choice):
    """A named set of choices: one word of params.yaml in place of five."""

    method: str
    _: KW_ONLY
    group: str = "row"
    allocation: str = "uniform"
    reconstruction: str = "none"
    propagation: str = "dense"
    # The recipe whose choices it has with a pattern of units, but for the group; None: its own.
    for_units: str | None = None


RECIPES = {row.name: row for row in (
    Recipe("magnitude", "the paper's baseline", "magnitude", group="linear"),
    Recipe("magnitude-rows", "the simplest baseline", "magnitude"),
    Recipe("wanda", "the paper's method, on dense blocks", "wanda"),
    Recipe("wanda-refit", "Wanda's masks; least squares gives new values", "wanda", reconstruction="least-squares"),
    Recipe("sparsegpt", "SparseGPT, a variant on the dense model's statistics; units as `wanda-refit`", "sparsegpt",
           group="linear", reconstruction="sparsegpt", for_units="wanda-refit"),
    Recipe("admm", "ADMM's masks; least squares gives new values; units as `wanda-refit`", "admm",
           reconstruction="least-squares", for_units="wanda-refit"),
    Recipe("fisher", "ADMM, with gradients of the loss; units as `wanda-refit`, with gradients", "admm",
           group="outputs", allocation="sensitivity", reconstruction="output-weighted", for_units="wanda-refit"),
    # The authors' procedures, which calibrate each block on the outputs of the pruned blocks before it.
    Recipe("wanda-paper", "the paper's procedure: Wanda calibrated on pruned blocks", "wanda", propagation="pruned"),
    Recipe("sparsegpt-paper", "the paper's procedure: SparseGPT calibrated on pruned blocks; units as `wanda-refit`",
           "sparsegpt", group="linear", reconstruction="sparsegpt", propagation="pruned", for_units="wanda-refit"),
    Recipe("ria", "the paper's procedure: RIA calibrated on pruned blocks", "ria", group="linear",
           propagation="pruned"),
    Recipe("owl", "the paper's procedure: OWL's sparsities, then Wanda calibrated on pruned blocks", "wanda",
           allocation="owl", propagation="pruned"),
)}  # fmt: skip


# --- sources ---

# A model on the Hub: an owner's name, one slash, and perhaps @ and a revision.
_NAME = r"[A-Za-z0-9][\w.\-]*/\w[\w.\-]*"
HUB_ID = re.compile(rf"{_NAME}(@\w[\w.\-/]*)?")
# A data set on the Hub: the same, and before @ perhaps a configuration.
HUB_TEXT = re.compile(rf"(?P<dataset>{_NAME})(:(?P<config>\w[\w.\-]*))?(@(?P<revision>\w[\w.\-/]*))?")
# A package on the index: a name by PEP 508 and a version by PEP 440: no path, no URL, no option, and no file's ending,
# because pip takes a local file `NAME==1.zip` for an archive.
PACKAGE = re.compile(
    r"package:[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?==([0-9]+!)?[0-9][0-9.]*((a|b|rc|\.post|\.dev)[0-9]+)*(\+[A-Za-z0-9]+)?"
)


@dataclass(frozen=True)
class NamedText:
    """A data set of text, its configuration, its splits, and how its rows are joined."""

    dataset: str | None  # its id on the Hub; None: a part of this package
    config: str | None
    column: str = "text"
    splits: tuple[str, ...] = ("train", "validation", "test")  # perplexity is measured on the last one
    join: str = "\n\n"  # between two rows, for perplexity
    revision: str | None = None  # None: its main branch
    # One file a split, for a data set too large to fetch completely. Calibration draws windows within its documents, as
    # the Wanda authors do.
    shards: dict[str, str] = field(default_factory=dict)


EMBEDDED = "embedded"
TEXTS = {
    EMBEDDED: NamedText(None, None, splits=("train", "test")),
    "wikitext2": NamedText("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "c4": NamedText("allenai/c4", None, splits=("train", "validation"), join=" ", shards={
        "train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz",
    }),
    # Its main branch is a script, which never runs here; the Hub has its rows as Parquet on another branch.
    "ptb": NamedText("ptb-text-only/ptb_text_only", "penn_treebank", "sentence", join=" ",
                     revision="refs/convert/parquet"),
}  # fmt: skip


def parse_pattern(pattern: str) -> tuple[int, int] | None:
    """Return (2, 4) for `"2:4"`: 2 of every 4 neighbours are kept. None for a pattern without neighbours."""
    n, colon, m = pattern.partition(":")
    return (int(n), int(m)) if colon else None
