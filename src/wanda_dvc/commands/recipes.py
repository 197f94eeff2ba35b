"""`wanda-dvc recipes`: the recipes side by side, with what each reads and costs."""

import re

from wanda_dvc.catalog import ALLOCATIONS, RECIPES, RECONSTRUCTIONS, Recipe, methods
from wanda_dvc.plan import CHOICES, UNSTRUCTURED, Plan
from wanda_dvc.results.markup import DASH, table
from wanda_dvc.study.files import Json, json_text

NOTE = (
    "`mask` and `apply` of SmolLM2-135M on two CPU cores, at 50 % (docs/results.md). norms: of each input feature; "
    "gram: also Gram matrices of the inputs; fisher: also gradients of eight windows. `calibrate` measures them once."
)


def recipes_text(*, as_json: bool = False) -> str:
    """Return the recipes as a table, or as JSON with their choices and links to the papers."""
    contents = [_content(recipe) for recipe in RECIPES.values()]
    if as_json:
        return json_text(contents)
    rows = []
    for content in contents:
        papers = [re.sub(r"\[(.+)\]\((\S+)\)", r"\1 (\2)", paper) for paper in content["papers"]]
        seconds = content["seconds"]
        rows.append([
            content["name"], content["about"], content["reads"], "new" if content["changes_weights"] else "unchanged",
            DASH if seconds is None else seconds, "; ".join(papers),
        ])  # fmt: skip
    headers = ["recipe", "result", "reads", "kept weights", "seconds", "papers"]
    return f"{table(headers, rows)}\n\nseconds: {NOTE}"


def _content(recipe: Recipe) -> Json:
    plan = Plan.from_recipe(recipe.name, dict.fromkeys(CHOICES), pattern=UNSTRUCTURED, sparsity=0.5)
    rows = (methods()[recipe.method], ALLOCATIONS[recipe.allocation], RECONSTRUCTIONS[recipe.reconstruction])
    reads = plan.tier
    if plan.propagates:
        reads = f"{'gram' if plan.mask_solves else reads}, of pruned blocks"
    elif plan.method.needs == "weights" and reads == "norms":
        reads = "weights"
    return {
        "name": recipe.name,
        "about": recipe.about,
        "reads": reads,
        "changes_weights": plan.reconstructs,
        "seconds": recipe.seconds,
        "papers": list(dict.fromkeys(row.paper for row in rows if row.paper)),
        "choices": {name: getattr(recipe, name) for name in CHOICES},
    }
