# A shim of pyenv may be there without its Python, so each is tried. Newer ones have no torch yet.
WORKS = $(shell $(1) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && echo $(1))
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3 python,$(call WORKS,$(name))))
UV := $(shell command -v uv 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin
# Two torch processes with two threads each on two cores are several times slower than one.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# From the environment to the shell as it is: make would expand what it has in it.
export BASE ?= origin/main
export BRANCH ?= HEAD

.PHONY: install demo test check check-entries docs bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
ifdef UV
	test -x $(BIN)/python || $(UV) venv --quiet --python '>=3.11,<3.14' $(VENV)
	$(UV) pip install --quiet --python $(BIN)/python -e '.[dev]' -c constraints.txt
else
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "make needs Python 3.11, 3.12 or 3.13," \
		"or uv. Install one, or name it: make PYTHON=/path/to/python demo" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot" \
		"make an environment; on Debian and Ubuntu install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
endif
	touch $@

demo: install
	$(BIN)/mmtard-bench run quick-v1 --model teacher-robust --model tiny-clip --out runs
	$(BIN)/mmtard-bench leaderboard --records runs --output runs/LEADERBOARD.md
	@echo "written to runs/LEADERBOARD.md"

test: install
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/mmtard-bench leaderboard --check --html

# What the commits of $BRANCH since $BASE change in the leaderboard. Other levels need the weights,
# and hours.
check-entries: install
	$(BIN)/mmtard-bench verify --level well-formed --since "$$BASE" --branch "$$BRANCH"

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
