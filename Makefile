PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Two torch processes with two threads each on two cores are several times slower than one.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# From the environment to the shell as it is: make would expand what it has in it.
export BASE ?= origin/main

.PHONY: install demo test check check-entries docs bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

demo: install
	$(BIN)/mmtard-bench run quick-v1 --model teacher-robust --model tiny-clip --out runs
	$(BIN)/mmtard-bench leaderboard --records runs --output runs/LEADERBOARD.md
	@echo "written to runs/LEADERBOARD.md"

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest -n 2
	$(BIN)/mmtard-bench leaderboard --check --html

# What a branch adds to the leaderboard since $BASE. Other levels need the weights, and hours.
check-entries: install
	$(BIN)/mmtard-bench verify --level well-formed --since "$$BASE"
	$(BIN)/mmtard-bench leaderboard --check --html

# The site, in an environment of its own: see docs/requirements.txt.
docs: install
	test -x .venv-docs/bin/mkdocs || $(BIN)/python -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	$(BIN)/python docs/commands.py > docs/reference/cli.md
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

bench: install
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/trainer.py

clean:
	rm -rf $(VENV) .venv-docs site runs dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
