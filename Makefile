# install, kvpress, llmlingua, run, study, bench, ui, docs, test, lint, lock, clean. What needs the environment makes it first, in .venv.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := run
# Peers that need an older transformers than this project have environments of their own, .venv-<peer>.
PEERS := kvpress llmlingua
.PHONY: install $(PEERS) run study bench ui docs test lint lock clean

PYTHON ?= python3
# Of the machine's; each job on the CPU holds its model in memory, so fewer cores need less.
CORES ?= all
BIN := .venv/bin
STAMP := .venv/.installed
# The one place that pins torch is pyproject.toml; which build it is, CPU or CUDA, the package index decides.
TORCH := $(shell sed -n 's/^constraint-dependencies = \["\(torch==[^"]*\)"\]$$/\1/p' pyproject.toml)
COMPILE := $(BIN)/uv pip compile --universal --generate-hashes --python-version 3.11 \
	--no-emit-package torch --no-annotate --no-header -q
LOCK := $(COMPILE) pyproject.toml --extra pipeline --extra harness --extra demo --extra dev
define CHECK_PYTHON
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed, e.g. make PYTHON=python3.12"; exit 1; }
endef

$(STAMP): envs/requirements.lock pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r envs/requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

install: $(STAMP)

$(PEERS:%=.venv-%/.installed): .venv-%/.installed: envs/%.lock pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r envs/$*.lock
	@touch $@

$(PEERS): %: .venv-%/.installed

# One run at a time in this folder: whoever holds the lock may clear what a killed run left locked.
ALONE = mkdir -p .snakemake/locks; exec 9> .snakemake/make.lock; \
	flock --nonblock 9 || { echo "another make is running the workflow in this folder; wait until it ends"; exit 1; }
# Of a run that was killed a step may live on and write; it ends as it would have. Folders of results may be links.
AWAIT = flock --nonblock "$$1" true || { echo "waiting for a step of a killed run: $$1, $$(cat "$$1")"; flock "$$1" true; }
AWAIT_STEPS = if [ -d results ]; then find -L results -name '.*.lock' -exec sh -c '$(AWAIT)' sh {} ';'; fi
# A Snakemake that lives holds running.lock, and what it locked is left to it.
define SNAKEMAKE
	@$(ALONE); \
	if flock --nonblock .snakemake/running.lock true; then \
		$(AWAIT_STEPS); \
		if [ -n "$$(ls -A .snakemake/locks)" ]; then $(BIN)/snakemake --quiet all --unlock; fi; \
	fi; \
	$(BIN)/snakemake --cores $(CORES)
endef

run: $(STAMP)
	$(SNAKEMAKE)

study: $(STAMP)
	$(SNAKEMAKE) --configfile config/study.yaml

bench: $(STAMP)
	$(SNAKEMAKE) --configfile config/bench.yaml

ui: $(STAMP)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
		$(BIN)/mlflow ui --host 127.0.0.1 --port 5000 \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/results/mlflow.db}"

# A link that leads nowhere fails. Open site/index.html.
docs: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/zensical build --clean --strict

test: lint
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/pytest \
		-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Of a lock file, what makes it, and what it is made from.
define CHECK_LOCK
	@fresh=$$(mktemp); trap 'rm -f "$$fresh"' EXIT; cp $(1) "$$fresh"; $(2) -o "$$fresh"; \
	diff -u $(1) "$$fresh" || { echo "$(1) is not what $(3) needs: make lock"; exit 1; }
endef

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint
	@$(BIN)/python workflow/scripts/config_manual.py | diff -u config/README.md - || \
		{ echo "config/README.md is not what the schema says: make config/README.md"; exit 1; }
	$(call CHECK_LOCK,envs/requirements.lock,$(LOCK),pyproject.toml)
	$(call CHECK_LOCK,envs/kvpress.lock,$(COMPILE) envs/kvpress.in,envs/kvpress.in)
	$(call CHECK_LOCK,envs/llmlingua.lock,$(COMPILE) envs/llmlingua.in,envs/llmlingua.in)

# Keeps the versions that still fit; `make lock UPGRADE=--upgrade` takes the newest.
lock: $(STAMP)
	$(LOCK) $(UPGRADE) -o envs/requirements.lock
	for peer in $(PEERS); do $(COMPILE) envs/$$peer.in $(UPGRADE) -o envs/$$peer.lock; done

config/README.md: workflow/schemas/config.schema.yaml src/sdtp/pipeline/schema.py $(STAMP)
	$(BIN)/python workflow/scripts/config_manual.py > $@

# What runs made and what tools cached; the environment stays.
clean:
	@$(ALONE); exec 8>> .snakemake/running.lock; \
	flock --nonblock 8 || { echo "a Snakemake is running in this folder; wait until it ends"; exit 1; }; \
	$(AWAIT_STEPS); set -x; \
	find -H results -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +; \
	rm -rf logs site .cache .snakemake .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
