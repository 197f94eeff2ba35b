"""What the shell completes. Each answers at once, without a network, and with nothing where there is no study."""

import shutil
import subprocess


def presets() -> list[str]:
    """The presets."""
    from wanda_dvc.study.presets import names

    return names()


def experiments() -> list[str]:
    """The experiments of the repository, as git knows them: DVC would take seconds to start."""
    if (git := shutil.which("git")) is None:
        return []
    command = [git, "for-each-ref", "--format=%(refname)", "refs/exps"]
    refs = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    # refs/exps/NN/COMMIT/NAME, of the commit that the experiment NAME started from; others are DVC's own.
    words = [ref.split("/") for ref in refs]
    return sorted({word[4] for word in words if len(word) == 5 and len(word[2]) == 2})


def dtypes() -> list[str]:
    """The dtypes that a model runs in."""
    return ["float32", "bfloat16", "float16"]
