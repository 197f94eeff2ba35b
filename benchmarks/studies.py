"""The projects that are measured: one for each dtype, one under DVC, one on a random checkpoint."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ours
from processes import HERE, ROOT, Part, Runner, say
from ruamel.yaml import YAML

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    samples: int  # calibration windows
    length: int  # tokens a window
    windows: int  # of perplexity
    tasks: tuple[str, ...]
    limit: int  # items a task
    batches: tuple[int, ...]  # tried for stock lm-eval
    tried: int  # items a task to try them on


FULL = Sizes(32, 2048, 16, ("piqa", "hellaswag", "arc_easy", "boolq", "rte"), 200, (1, 4, 16, 64), 20)
QUICK = Sizes(4, 128, 4, ("piqa", "boolq"), 4, (1, 16), 2)


@dataclass(frozen=True)
class Studies:
    """Makes each project when it is first asked for, and finds it again when a run is resumed."""

    runner: Runner
    sizes: Sizes
    mirror: Path | None  # of the real texts and tasks
    given: Path | None  # a model instead of params.yaml's

    @property
    def work(self) -> Path:
        """The folder of all projects."""
        return self.runner.work

    @property
    def quick(self) -> bool:
        """Whether the harness is only tried, on a tiny model."""
        return self.sizes is QUICK

    # --- settings ---

    def settings(self, folder: Path, changes: dict[str, Any]) -> None:
        """Change a project's params.yaml, at first the repository's; settings by dotted name."""
        yaml = YAML()
        path = folder / "params.yaml"
        params = yaml.load((path if path.is_file() else ROOT / "params.yaml").read_text(encoding="utf-8"))
        for name, value in changes.items():
            *sections, leaf = name.split(".")
            target = params
            for section in sections:
                target = target[section]
            target[leaf] = value
        yaml.dump(params, path)

    def _measured(self) -> dict[str, Any]:
        """Return the settings of what is measured: sizes, texts, tasks and model."""
        changes: dict[str, Any] = {
            "calibration.windows": self.sizes.samples,
            "calibration.length": self.sizes.length,
            "perplexity.length": self.sizes.length,
            "perplexity.windows": self.sizes.windows,
            "tasks.names": list(self.sizes.tasks),
            "zero_shot.limit": self.sizes.limit,
        }
        if self.mirror:
            changes |= {
                "runtime.mirror": str(self.mirror.resolve()),
                "calibration.text.source": "wikitext2",
                "calibration.text.split": "validation",
                "perplexity.texts": {"wikitext2": {"source": "wikitext2"}},
                "tasks.source": "benchmark",
            }
        return changes | self._source

    @cached_property
    def _source(self) -> dict[str, Any]:
        """The setting of the model, where it is not params.yaml's."""
        if self.given:
            return {"model": str(self.given.resolve())}
        return {"model": str(self._tiny)} if self.quick else {}

    @cached_property
    def _tiny(self) -> Path:
        """A random model of three blocks."""
        tiny = self.work / "tiny"
        if not (tiny / "config.json").is_file():
            self.runner.run(sys.executable, HERE / "memory.py", "make", tiny, "--config", json.dumps(TINY))
        return tiny

    # --- projects ---

    def project(self, dtype: str = "float32") -> Path:
        """Return a project without DVC that has its downloads. Projects of all dtypes share them."""
        folder = self.work / dtype
        if (folder / "ready").is_file():
            return folder
        folder.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
        self.settings(folder, self._measured() | {"dtype": dtype})
        if dtype == "float32":
            self._download(folder, "model", "calibration", "perplexity", "tasks")
        else:
            first = self.project()
            (folder / "models").mkdir(exist_ok=True)
            (folder / "models/dense").symlink_to(first / "models/dense")
            (folder / "data").symlink_to(first / "data")
        (folder / "ready").touch()
        return folder

    def _download(self, folder: Path, *parts: str) -> None:
        for part in parts:
            say(f"download {part}")
            self.runner.run("wanda-dvc", "download", part, cwd=folder)

    @property
    def model(self) -> Path:
        """The dense model."""
        return self.project() / "models/dense"

    def token_file(self, part: str) -> Path:
        """Return a .npy with the windows that the project draws from a text, for the baselines."""
        path = self.work / f"{part}.npy"
        if not path.is_file():
            np.save(path, ours.windows(self.project(), part))
        return path

    def on_a_random_checkpoint(self, shape: dict[str, Any] | None = None, *, name: str = "memory") -> Path:
        """Return a project on a random checkpoint of a shape, Qwen2.5-1.5B's, in bfloat16 as it is stored."""
        folder = self.work / name
        if (folder / "ready").is_file():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shape = TINY | {"hidden_size": 256, "intermediate_size": 1024} if self.quick else shape or {}
        shard = ["--shard", "1e6"] if self.quick else []
        made = self.work / f"random-{name}"
        say("making a random checkpoint")
        self.runner.run(sys.executable, HERE / "memory.py", "make", made, "--config", json.dumps(shape), *shard)
        shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
        changes = {"model": str(made), "dtype": "bfloat16", "calibration.windows": 2, "perplexity.windows": 2}
        self.settings(folder, changes)
        self._download(folder, "model", "calibration", "perplexity")
        shutil.rmtree(made)
        (folder / "ready").touch()
        return folder

    # --- DVC ---

    @property
    def under_dvc(self) -> Path:
        """The repository's default project, in its own git and DVC repository."""
        folder = self.work / "dvc"
        if (folder / "ready").is_file():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copyfile(ROOT / "dvc.yaml", folder / "dvc.yaml")
        self.settings(folder, self._measured() if self.quick else self._source)
        self.runner.run("git", "init", "-q", cwd=folder)
        self.runner.run("dvc", "init", "-q", cwd=folder)
        for file in (".dvc/config", ".gitignore", ".dvcignore"):
            shutil.copyfile(ROOT / file, folder / file)
        (folder / "ready").touch()
        return folder

    def repro(self, *words: str) -> Part:
        """Run `dvc repro`; return its wall seconds, those inside the stages that ran, and their number."""
        folder = self.under_dvc
        done = self.runner.run("dvc", "repro", *words, cwd=folder)
        said = (self.work / "last.log").read_text(errors="replace")
        commands = re.findall(r"^> wanda-dvc (.*?) --stage-version", said, flags=re.MULTILINE)
        timed = [command.split() for command in commands]
        return done | {"inside": sum(ours.seconds_inside(folder, *command) for command in timed), "ran": len(timed)}

    def forget_dvc(self) -> None:
        """Remove the project under DVC with its cache."""
        shutil.rmtree(self.work / "dvc", ignore_errors=True)
