# Two commands do everything on a fresh machine: `make repro` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORES ?= logical
# `make LOCK=` installs the newest libraries that pyproject.toml allows.
LOCK ?= --constraint requirements.lock
FAST := fuzz gram needs params plan products report results selection solvers
SHORT := not full and not pipeline and not slow
export PATH := $(abspath $(BIN)):$(PATH)
# Containers set it. Each of the tests' processes would then compile the package and the tests again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: repro test check test-all test-fast coverage bench demo gpu docs wheel lint lock install

repro: install ## create the environment, run the pipeline on the embedded default, print the results
	dvc repro
	@wanda-dvc show

test: lint check ## lint, and each law on a row of its grid or a few; without the tests on a real DVC repository, which run each night

check: install ## the tests of `make test`, without lint
	pytest -n $(CORES) --dist worksteal -m "$(SHORT)"

test-all: install lint ## every law on its whole grid, on real DVC repositories and on Ray, with more crashes and drawn examples, as each night
	WANDA_DVC_NEW_EXAMPLES=1 WANDA_DVC_CRASHES=$${WANDA_DVC_CRASHES:-10} WANDA_DVC_KILLS=$${WANDA_DVC_KILLS:-3} pytest -n $(CORES) --dist worksteal

test-fast: install ## of `check`, the laws of numbers, settings and results, in under a minute: no test of these files runs a stage
	pytest -n $(CORES) --dist worksteal -m "$(SHORT)" $(FAST:%=tests/test_%.py)

coverage: install ## the tests of `make test`, with a table of the lines and branches that none reaches; fails below the floor in pyproject.toml
	pytest -n $(CORES) --dist worksteal -m "$(SHORT)" --cov --cov-report term

bench: install ## measure against the published procedure, stock lm-eval and the floor; BENCH="--mirror DIR --rows calibrate"
	python benchmarks/peers.py $(BENCH)

demo: install ## run the README's demo, minutes on two cores, and write what it prints into the README
	python benchmarks/demo.py
	python scripts/figures.py

gpu: install ## time each stage on a GPU and compare its results with the CPU's, in 15 minutes; GPU="--device cpu --tiny" tries it
	python benchmarks/gpu.py $(GPU)
	python scripts/figures.py

docs: $(BIN)/.docs-installed ## build the documentation site into .site/html; a broken link or anchor is an error
	python scripts/pages.py
	zensical build --strict --config-file .site/zensical.toml

$(BIN)/.docs-installed: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet $(LOCK) --editable '.[docs]'
	touch $@

wheel: ## install the wheel into a fresh environment, make a study outside any clone, and run it to the end
	scripts/wheel.sh $(PYTHON)

lint: install
	ruff check
	ruff format --check
	mypy
	lint-imports --no-logo
	python scripts/words.py

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wanda-dvc needs Python 3.11 or later: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile $(LOCK) --editable '.[dev]'
	touch $@

lock: install ## write the installed versions into requirements.lock; torch without its build, such as +cpu, which differs by platform
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/^\(torch==[^+]*\)+.*/\1/' | grep -v -i -E '^(nvidia-|cuda-|triton|setuptools|pip)([=-]|$$)' > requirements.lock
