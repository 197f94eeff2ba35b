"""The architecture of the package: who imports whom, and what a light module loads."""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest
from conftest import ROOT
from importlinter.cli import lint_imports

HEAVY = {"torch", "transformers", "lm_eval", "datasets", "dvc", "numpy", "matplotlib", "scipy"}


def test_imports_keep_the_contracts_of_pyproject(capsys: pytest.CaptureFixture[str]):
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_no_module_imports_itself_by_way_of_others():
    """import-linter compares the packages of one folder; this also covers a package and its own modules.

    The root is left out: every module may read its `__version__`.
    """
    graph = grimp.build_graph("wanda_dvc", cache_dir=None)
    arrows = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules - {"wanda_dvc"}}
    try:
        TopologicalSorter({module: found - {"wanda_dvc"} for module, found in arrows.items()}).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", ["catalog", "cli", "errors", "params"])
def test_a_light_module_loads_no_heavy_library(module: str):
    heavy = HEAVY | ({"pydantic"} if module == "cli" else set())
    code = f"import sys, wanda_dvc.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
