"""A multiple-choice task: lm-eval's own definition of it, on items from a file."""

from pathlib import Path
from typing import Any

from wanda_dvc.engine.checkpoint import reason
from wanda_dvc.errors import UserError
from wanda_dvc.reading import read_lines

AGAIN = "run `wanda-dvc download tasks` again"


def load_task(definition: str, role: str, items: Path, *, name: str = "", todo: str = AGAIN) -> Any:
    """Return lm-eval's task: its own YAML file, with the items as the split in that role alone.

    `name` names the items in messages instead of their path, and `todo` says how to correct them.

    Raises:
        UserError: there are no items, an item has other fields than the first, or lm-eval finds no label among the
            item's choices. lm-eval alone would count these items as wrong answers.
    """
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    name = name or str(items)
    rows = _rows(items, name, todo)
    tasks = Path(lm_eval.tasks.__file__).parent
    # Definitions may name Python files, and lm-eval runs them. So only lm-eval's own definitions are read.
    if not (tasks / definition).resolve().is_relative_to(tasks.resolve()) or not (tasks / definition).is_file():
        raise UserError(f"{name}: got the definition {definition}, expected one of lm-eval's; {todo}")
    config = load_yaml(tasks / definition)
    config |= {f"{name}_split": role if name == role else None for name in ("training", "validation", "test")}
    config |= {"fewshot_split": None}  # lm-eval would look for the split, even without examples
    config |= {"custom_dataset": lambda **_: {role: Dataset.from_list(rows)}, "num_fewshot": 0}
    try:
        task = ConfigurableTask(config=config)
        for number, item in enumerate(task.eval_docs, start=1):
            _check_label(task, item, f"{name}: item {number}", todo)
    except UserError:
        raise
    except Exception as error:  # the definitions' templates and functions raise any of them
        raise UserError(f"{name}: lm-eval cannot read the items ({reason(error)}); {todo}") from error
    return task


def _rows(items: Path, name: str, todo: str) -> list[dict[str, Any]]:
    """Read the items. UserError without items, or if one lacks a field of the first."""
    rows = [row for _, row in read_lines(items, todo)]
    if not rows:
        raise UserError(f"{name}: no items, expected one a line; {todo}")
    for number, row in enumerate(rows, start=1):
        if missing := ", ".join(field for field in rows[0] if field not in row):
            raise UserError(f"{name}: item {number}: no {missing}, expected the fields of the first item; {todo}")
    return rows


def _check_label(task: Any, item: Any, where: str, todo: str) -> None:
    """Raise UserError if an item's label, or one of several, is not among its choices."""
    choices = task.doc_to_choice(item)
    # With a context for each choice, such as WinoGrande's, lm-eval has the label in place of the text.
    found = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    for label in found if isinstance(found, list) else [found]:
        if not (label in choices if isinstance(label, str) else isinstance(label, int) and 0 <= label < len(choices)):
            raise UserError(f"{where}: label {label!r:.40}, expected one of {len(choices)} choices; {todo}")
