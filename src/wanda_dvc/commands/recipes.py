"""`wanda-dvc recipes`: the recipes side by side, with what each reads."""

import re

from wanda_dvc.catalog import ALLOCATIONS, RECIPES, RECONSTRUCTIONS, Recipe, methods
from wanda_dvc.plan import CHOICES, UNSTRUCTURED, Plan
from wanda_dvc.results.markup import table
from wanda_dvc.study.files import Json, json_text

NOTE = "norms: of each input feature; gram: also Gram matrices of inputs; fisher: also gradients of eight windows."


def recipes_text(*, as_json: bool = False) -> str:
    """Return the recipes as a table, or as JSON with their choices and links to the papers."""
    contents = [_content(recipe) for recipe in RECIPES.values()]
    if as_json:
        return json_text(contents)
    rows = []
    for content in contents:
        papers = [re.sub(r"\[(.+)\]\((\S+)\)", r"\1 (\2)", paper) for paper in content["papers"]]
        kept = "new" if content["changes_weights"] else "unchanged"
        rows.append([content["name"], content["about"], content["reads"], kept, "; ".join(papers)])
    return f"{table(['recipe', 'result', 'reads', 'kept weights', 'papers'], rows)}\n\n{NOTE}"


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
        "papers": list(dict.fromkeys(row.paper for row in rows if row.paper)),
        "choices": {name: getattr(recipe, name) for name in CHOICES},
    }
