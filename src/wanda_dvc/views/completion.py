"""Completions for the shell: immediate, without a network, and empty outside a study."""

import shutil
import subprocess


def presets() -> list[str]:
    """Return the presets."""
    from wanda_dvc.study.settings import preset_names

    return preset_names()


def experiments() -> list[str]:
    """Return the experiments in the repository, by git: DVC takes seconds to start."""
    if (git := shutil.which("git")) is None:
        return []
    command = [git, "for-each-ref", "--format=%(refname)", "refs/exps"]
    refs = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    # refs/exps/NN/COMMIT/NAME, with the base commit of the experiment NAME; other refs are internal to DVC.
    words = [ref.split("/") for ref in refs]
    return sorted({word[4] for word in words if len(word) == 5 and len(word[2]) == 2})
