"""A study on disk: the only module with the paths of its files."""

import contextlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from wanda_dvc.catalog import STATISTICS
from wanda_dvc.errors import UserError
from wanda_dvc.params import Params, read_params
from wanda_dvc.plan import Plan
from wanda_dvc.reading import read_object, read_text
from wanda_dvc.study.artifact import Work, digest, locked
from wanda_dvc.study.files import Json

TEXT, DOCUMENTS, ITEMS = "text.txt", "documents.json.gz", "items.jsonl"  # the files of data/


class Study:
    """A pruning study: a directory with `params.yaml`, `dvc.yaml` and the stages' outputs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.norms, self.gram, self.fisher = (root / "stats" / name for name in STATISTICS)
        self.blocks = root / "stats" / "blocks"  # the measured choices of blocks to remove
        self.masks = root / "masks"
        self.weights = root / "weights"  # new weights that cannot be recomputed from masks/ and stats/

    @classmethod
    def find(cls, start: Path | None = None) -> "Study":
        """Return the study around `start` (by default this folder): the nearest folder with a `params.yaml`."""
        start = (start or Path.cwd()).resolve()  # not DVC_ROOT: in a queued experiment that is another checkout
        for folder in (start, *start.parents):
            if (folder / "params.yaml").is_file():
                return cls(folder)
        raise UserError(f"{start}: no params.yaml here or above; cd into a study, or make one: `wanda-dvc init DIR`")

    @cached_property
    def params(self) -> Params:
        """The settings, checked."""
        return read_params(self.root / "params.yaml")

    def stage_input(self, name: str) -> Json:
        """Return what a stage is given of the settings: the content of a file in `plan/`, such as `calibrate/norms`."""
        return read_object(self.root / "plan" / f"{name}.json", "run `dvc repro` or `wanda-dvc plan`")

    @cached_property
    def plan(self) -> Plan:
        """How the model is pruned, as the stage `plan` stored it."""
        return Plan.from_dict(self.stage_input("mask"))

    def with_params(self, params: Params) -> "Study":
        """Return the study with other settings than its `params.yaml`."""
        study = Study(self.root)
        study.params = params
        return study

    def link_to(self, source_study: "Study", *names: str) -> None:
        """Link to folders and files of another study, where they exist."""
        for name in names:
            source, target = source_study.root / name, self.root / name
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)

    def model(self, which: str) -> Path:
        """Return the folder of the `dense`, the `pruned` or the `recovered` model."""
        return self.root / "models" / which

    def source(self, name: str) -> Path:
        """Return the link to a local source, such as `model` or `perplexity/NAME`; or the note that it is not local."""
        return self.root / "sources" / name

    def data(self, name: str) -> Path:
        """Return a folder of `data/`: `tasks`, or a text: `calibration`, `calibration/0` or `perplexity/NAME`."""
        return self.root / "data" / name

    def text(self, name: str) -> str:
        """Return a text of a folder of `data/`, such as `calibration` or `perplexity/NAME`."""
        todo = f"run `dvc repro` or `wanda-dvc download {name.partition('/')[0]}` again"
        return read_text(self.data(name) / TEXT, todo)

    @property
    def work_root(self) -> Path:
        """The folder of unfinished work: in the repository in which DVC was started, as queued checkouts are temporary.

        Without DVC, the repository that DVC would find; a new `.dvc` here would separate the study from it.
        """
        root = self.root.absolute()
        repository = next((folder for folder in (root, *root.parents) if (folder / ".dvc").is_dir()), root)
        return Path(os.environ.get("DVC_ROOT") or repository) / ".dvc" / "tmp" / "wanda-dvc"

    def reference(self, text: str) -> Path:
        """Return the folder of the dense model's predictions on the windows of a text."""
        return self.root / "reference" / text

    def metrics(self, which: str, name: str) -> Path:
        """Return the file of metrics, such as `metrics/dense/perplexity/embedded.json`."""
        return self.root / "metrics" / which / f"{name}.json"

    def details(self, which: str, name: str) -> Path:
        """Return the file of the protocol and each window's or item's result."""
        return self.root / "metrics" / "details" / which / f"{name}.json"

    @property
    def python_state(self) -> Path:
        """The file of the settings that the functions of the Python interface start from."""
        return self.work_root.with_name("wanda-dvc-python.json")

    def plots(self, name: str) -> Path:
        """Return the data file of a plot."""
        return self.root / "metrics" / "plots" / f"{name}.csv"

    def work_path(self, made_from: Json) -> Path:
        """Return the folder of the unfinished work of a set of inputs, parameters and versions."""
        return self.work_root / digest(made_from)[:32]

    @contextlib.contextmanager
    def work(self, made_from: Json) -> Iterator[Work]:
        """Open the unfinished work of a set of inputs, parameters and versions: one process at a time, others wait."""
        path = self.work_path(made_from)
        with locked(path, "waiting for another run with the same inputs and parameters …"):
            yield Work(path)
