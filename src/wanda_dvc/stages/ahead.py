"""Tasks that a zero-shot run answers ahead of the runs that will ask for them.

A run answers one task, so that a task that is added runs alone. On a small model that takes 0.3 s, and its process
takes 3 s to start. So a run that DVC started goes on with the tasks that have no result yet, for some seconds at most.
Their results wait in the work folder of their own runs, under the hash of all that they follow from. Those runs publish
them without torch.
"""

import os
import time

from wanda_dvc.errors import UserError
from wanda_dvc.stages import STAGES
from wanda_dvc.stages.running import measured
from wanda_dvc.stages.zero_shot import answer, protocol_of, publish
from wanda_dvc.study.files import load_json, write_json
from wanda_dvc.study.project import ITEMS, Project

SECONDS = 20  # a few starts; at most so long is lost where DVC was asked for one task alone
ANSWERED = "answered.json"
STAGE = STAGES["zero-shot"]


def publish_answered(project: Project, model: str, task: str) -> bool:
    """Publish what an earlier run has answered ahead; whether there was anything."""
    project = project.limited_to(STAGE.settings_of(model))
    try:
        protocol = protocol_of(project, model, task)
    except UserError:
        return False  # the run itself says what is wrong
    with project.work(protocol) as work:
        answered = load_json(work.path / ANSWERED)
        if not answered:
            return False
        publish(project, model, task, answered)
        if key := STAGE.key(project, model, task):
            project.times.write(STAGE.run_name(model, task), key, answered["times"])
        work.forget()
    return True


def answer_ahead(project: Project, model: str, task: str, seconds: float) -> None:
    """Answer the other tasks that have no result yet, as far as `SECONDS` reach, if DVC will ask for them.

    `seconds` is what `task` took; another task is expected to take as long for each character of its items.
    """
    if "DVC_STAGE" not in os.environ:
        return
    project = project.limited_to(STAGE.settings_of(model))
    folder = project.data("tasks")
    pace, end = seconds / _size(project, task), time.monotonic() + SECONDS
    for other in sorted(path.parent.name for path in folder.glob(f"*/{ITEMS}")):
        try:
            if other != task and time.monotonic() + pace * _size(project, other) < end:
                _answer_ahead(project, model, other)
        except Exception:  # its own run meets it too, and says it
            return


def _answer_ahead(project: Project, model: str, task: str) -> None:
    protocol = protocol_of(project, model, task)
    if load_json(project.details(model, f"zero_shot/{task}")).get("protocol") == protocol:
        return
    with project.work(protocol, wait=False) as work:
        if not load_json(work.path / ANSWERED):
            with measured(project.params.runtime) as times:
                answered = answer(project, model, task, protocol, work)
            write_json(work.path / ANSWERED, answered | {"times": times})


def _size(project: Project, task: str) -> int:
    """Characters of the items of a task that are asked."""
    lines = (project.data("tasks") / task / ITEMS).read_text(encoding="utf-8").splitlines()
    return sum(map(len, lines[: project.params.zero_shot.limit]))
