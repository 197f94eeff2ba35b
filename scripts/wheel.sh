#!/usr/bin/env bash
# The wheel as a user gets it: built, installed into a fresh environment, and a study made and run outside any clone.
#   scripts/wheel.sh [PYTHON]        by default python3
# WHEEL_SETTINGS: settings for a shorter run, such as "tasks.limit=8 perplexity.windows=16".
# WHEEL_TORCH: how to install torch first, such as "uv pip install --torch-backend cpu torch"; by default as the index has it.
# WHEEL_DIST: the folder that holds the built wheel; by default it is built.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { echo "$(date +%T) $*"; }

cd "$work"
unset PYTHONPATH
"$python" -m venv fresh
export PATH=$work/fresh/bin:$PATH VIRTUAL_ENV=$work/fresh
export GIT_AUTHOR_NAME=wheel GIT_AUTHOR_EMAIL=wheel@example.org GIT_COMMITTER_NAME=wheel GIT_COMMITTER_EMAIL=wheel@example.org
dist=${WHEEL_DIST:-$work/dist}
[ -n "${WHEEL_DIST:-}" ] || pip wheel --quiet --no-deps --wheel-dir "$dist" "$root"
say "built $(basename "$dist"/*.whl)"
[ -z "${WHEEL_TORCH:-}" ] || eval "$WHEEL_TORCH"
pip install --quiet "$dist"/*.whl
say "installed: $(du -sm fresh | cut -f 1) MB"

wanda-dvc --version
wanda-dvc init study
cd study
for setting in ${WHEEL_SETTINGS:-}; do
    python - "$setting" <<'PY'
import sys
from pathlib import Path

from ruamel.yaml import YAML

from wanda_dvc.params import nested
from wanda_dvc.study.scaffold import updated

name, _, value = sys.argv[1].partition("=")
path = Path("params.yaml")
YAML().dump(updated(YAML(typ="safe").load(path), nested({name: int(value)})), path)
PY
done
wanda-dvc doctor
say "the pipeline"
dvc repro
wanda-dvc show
say "another sparsity"
dvc exp run --name sparser --set-param sparsity=0.7 | tee run.log
rm run.log
wanda-dvc list
# Without its extra a command says what to run, in one line.
if python -c 'import matplotlib' 2> /dev/null; then echo "matplotlib came with the base dependencies" && exit 1; fi
status=0
said=$(wanda-dvc report 2>&1) || status=$?
[ "$status" -eq 2 ] && [[ $said == *"pip install 'wanda-dvc[report]'"* ]]
pip install --quiet "$(ls "$dist"/*.whl)[report]"
say "with [report]: $(du -sm "$work/fresh" | cut -f 1) MB"
wanda-dvc report
wanda-dvc export sparser "$work/model"
test -f report.html -a -f "$work/model/model.safetensors"
say "done"
