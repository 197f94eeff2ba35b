"""Check the settings, link the local sources, and write what each stage has to know of the others: no torch."""

from wanda_dvc.errors import notice
from wanda_dvc.study.local import link_source, sources
from wanda_dvc.study.plans import PLAN, write_plan
from wanda_dvc.study.project import Project, remove


def plan(*, project: Project) -> None:
    """params.yaml → plan/, sources/model, sources/calibration, sources/perplexity/NAME and sources/tasks."""
    params = project.params
    parts, texts = sources(params), project.source("perplexity")
    for part in parts:
        link_source(project, part)
    for place in texts.iterdir():
        if f"perplexity/{place.name}" not in parts:  # of a removed text
            remove(place)
    _report(project)
    folder = project.root / PLAN
    remove(new := folder.with_name(f"{PLAN}.part"))
    write_plan(new, params)
    remove(folder)
    new.rename(folder)


def _report(project: Project) -> None:
    """Report settings that the pattern replaces."""
    params, plan = project.params, project.params.plan
    if plan.left_out:
        notice(
            f"plan: pattern {plan.pattern} has choices of its own: {', '.join(plan.left_out)} ignored (recipe "
            f"{params.recipe})"
        )
    if float(plan.share) != params.sparsity:
        notice(
            f"plan: pattern {plan.pattern} sets the sparsity to {float(plan.share):g}; sparsity {params.sparsity:g} "
            "ignored"
        )
