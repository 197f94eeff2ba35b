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
    # refs/exps/NN/COMMIT/NAME, with the base commit of the experiment NAME; DVC's other refs are shorter.
    command = [git, "for-each-ref", "--format=%(refname:lstrip=4)", "refs/exps"]
    return sorted(set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()))
