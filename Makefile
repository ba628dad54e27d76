# What the README and CI call. Everything is installed into .venv from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Never ask a model hub from a test, and keep thread pools at the size of the machine.
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Two processes, whatever the machine: each may hold the embedded model. A file stays in one, for what its tests share;
# files are taken in the order that tests/conftest.py gives them.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test check fast format bench readme clean
.DEFAULT_GOAL := check

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: $(VENV)/.demo
	$(BIN)/sae-emotion quickstart

test: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python -m pytest -q $(WORKERS)

fast: $(VENV)/.test
	$(TEST_ENV) $(BIN)/python -m pytest -q $(WORKERS) -m "not slow and not gpu"

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Only made where there is none: a benchmark reads it.
report/generations.json: | $(VENV)/.demo
	$(BIN)/sae-emotion quickstart

# `make bench TEXTS=FOLDER` also runs those that read a folder of corpora: hours.
BENCHMARKS := association dashboard_parity dashboards discover encode generate load_openai masked_effects train
WITH_TEXTS := blog_training dead_latents probe_tasks reference_saes trainers transfer

bench: $(VENV)/.test report/generations.json
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(if $(TEXTS),for name in $(WITH_TEXTS); do $(BIN)/python benchmarks/$$name.py --texts "$(TEXTS)" || exit 1; done)

readme: $(VENV)/.test
	$(BIN)/python tests/readme_reference.py

clean:
	rm -rf $(VENV) build dist *.egg-info
