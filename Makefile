# headtail: every command a newcomer or CI needs. `make` lists them.
#
# The virtual environment is made from a full lock with digests (requirements/cpu.lock); docs/decisions/0004-cpu-lock.md says how.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV        := .venv
BIN         := $(VENV)/bin
PYTHON      ?= python3.11
ROOT        ?= build/quickstart
PORT        ?= 8000
UI_PORT     ?= 5000
SIZE        ?= small
CONFIG      ?= jobs/configs/run_pipeline.laptop$(if $(filter full,$(SIZE)),-full).yaml
$(if $(filter small full,$(SIZE)),,$(error SIZE is small or full, not $(SIZE)))
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
INSTALLED   := $(VENV)/.installed

# what was given of LOG, TASK, LABELS, TEACHER and SET, as flags of `headtail pipeline`
PIPELINE_SETS = $(if $(LOG),--set 'log=$(LOG)') $(if $(TASK),--set 'task=$(TASK)') $(if $(LABELS),--set 'labels=$(LABELS)') \
            $(if $(TEACHER),--set 'precompute_teacher.model.model=$(TEACHER)') $(foreach field,$(SET),--set '$(field)')

BENCH_PACKAGES := build/bench/packages

KILLS       ?= 1000
ENGINE      ?= null
KEYS        ?= 10000000
BENCH_ARGS  ?= --engine decoder=transformers

.PHONY: help install quickstart ui serve test test-fast test-vllm check format chaos bench-precompute bench-cache bench-scale bench-suspects bench-seeds bench-distill bench-serve bench-failures simulate-releases simulate-statistics bench-numbers bench-ingest measure clean bench-forecast

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(INSTALLED) ## make .venv from the lock (2-3 minutes, once)

$(INSTALLED): requirements/torch.txt requirements/cpu.lock requirements/install.sh pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. headtail needs CPython 3.11: install it, or name it: make install PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v == (3, 11) or sys.exit(f"error: $(PYTHON) is Python {v[0]}.{v[1]}; the lock was made for 3.11 (docs/versions.md says how to install for another)")'
	@requirements/install.sh $(VENV) $(PYTHON) build/install.log
	@touch $@
	@echo "installed: $$($(BIN)/headtail --version 2>/dev/null || echo headtail)"

quickstart: install ## the whole pipeline on the shipped example (SIZE=full: a larger one), or on yours: LOG= TASK= LABELS= TEACHER= SET='field=value ...'
	@$(BIN)/headtail pipeline --config $(CONFIG) --root $(ROOT) $(PIPELINE_SETS)

ui: install ## MLflow on what ran
	@test -f $(ROOT)/mlflow.db || { echo "error: $(ROOT)/mlflow.db not found: run make quickstart first, or name another store: make ui ROOT=..." >&2; exit 2; }
	@echo "MLflow: http://127.0.0.1:$(UI_PORT)  (Ctrl-C ends it)"
	@$(BIN)/mlflow ui --backend-store-uri sqlite:///$(abspath $(ROOT)/mlflow.db) --host 127.0.0.1 --port $(UI_PORT) --workers 1

serve: install ## serve the current release on PORT (try-it page and API docs on the port after it)
	@$(BIN)/headtail serve --root $(ROOT) --set port=$(PORT)

test: install ## all tests, TEST_WORKERS=2 files at once (HEADTAIL_TEST_TIME_SCALE=3 on a slow machine)
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: install ## tests that start no engine, cluster, browser or S3 server
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow" $(PYTEST_ARGS)

test-vllm: ## the tests that start vLLM, with another release of it: VERSION=0.32.0 (an environment of its own, build/vllm-VERSION)
	@$(if $(VERSION),,$(error name a release: make test-vllm VERSION=0.32.0))requirements/test_vllm.sh $(VERSION) $(PYTHON) $(PYTEST_ARGS)

check: install ## the gate: format, lint, types, floors, layout
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted: run make format" >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@said=$$($(BIN)/lint-imports --no-logo) || { echo "$$said"; exit 1; }; echo "$$said" | tail -n 1
	@$(BIN)/python -m pytest -q --no-header -o addopts="" tests/test_layout.py

format: install ## format the code and mend what lint can
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .

chaos: install ## kill a job KILLS times (ENGINE=null or vllm), count what is lost: build/chaos.json (1000 kills: 40 minutes)
	@$(BIN)/python -m tests.chaos --kills $(KILLS) --engine $(ENGINE) --out build/chaos.json

bench-precompute: install ## raw vLLM, ray.data.llm and headtail side by side; the cache: build/bench/precompute.json (15 minutes)
	@$(BIN)/python -m tests.bench.precompute --cache --keys $(KEYS)

bench-cache: install ## the cache beside SQLite, RocksDB and Redis: build/bench/cache.json (6 minutes)
	@$(BIN)/python -m tests.bench.cache --keys $(KEYS)

bench-suspects: install ## how well curation finds planted errors: build/bench/suspects.json (2 minutes)
	@$(BIN)/python -m tests.bench.suspects

bench-forecast: install ## whether the planner's bands hold on days that it never saw: build/bench/forecast.json (BING=folder adds the Bing log; 5 minutes)
	@$(BIN)/python -m tests.bench.forecast $(if $(BING),--bing '$(BING)')

bench-seeds: install ## how often the quickstart's gates pass, 20 seeds in two precisions: build/bench/seeds.json (an hour)
	@$(BIN)/python -m tests.bench.seeds

bench-serve: quickstart ## the server beside a bare ASGI function and stock Ray Serve, needs wrk: build/bench/serve.json (10 minutes)
	@$(BIN)/python -m tests.bench.serve --root $(ROOT)

bench-failures: quickstart ## the server under load while its parts are killed, with 10 million keys, needs redis-server: build/bench/serve_failures.json (10 minutes)
	@$(BIN)/python -m tests.bench.serve_failures --root $(ROOT)

.PHONY: bench-overload
bench-overload: quickstart ## the server for a minute under three times the misses that a small BERT answers, in an open loop: build/bench/overload.json (3 minutes)
	@$(BIN)/python -m tests.bench.overload --root $(ROOT) --larger $(OVERLOAD_ARGS)

.PHONY: bench-simulate
bench-simulate: quickstart ## the simulator beside the server, the same requests at two loads: build/bench/simulate.json (3 minutes)
	@$(BIN)/python -m tests.bench.simulator --root $(ROOT) $(SIMULATE_ARGS)

bench-distill: SIZE := full
bench-distill: quickstart ## training beside Hugging Face's Trainer, the quickstart's students beside their teacher: build/bench/distill.json
	@$(BIN)/python -m tests.bench.distill --root build/quickstart $(BENCH_ARGS)

bench-scale: install ## 1, 5 and 20 million rows through the null engine: build/bench/scale.json (15 minutes)
	@$(BIN)/python -m tests.bench.scale

simulate-releases: install ## canaries by simulation: false returns in a month, queries to catch a regression: build/bench/releases.json (half an hour)
	@$(BIN)/python -m tests.bench.releases

simulate-statistics: install ## intervals, gates, experiments by simulation, in full: build/bench/statistics.json
	@$(BIN)/python -m tests.bench.statistics

bench-ingest: $(BENCH_PACKAGES)/duckdb ## 50 million events beside DuckDB: build/bench/ingest.json (10 minutes, 2 GB of disk)
	@PYTHONPATH=$(BENCH_PACKAGES) $(BIN)/python -m tests.bench.ingest

$(BENCH_PACKAGES)/duckdb: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --target $(BENCH_PACKAGES) duckdb==2.0.1

bench-numbers: $(BENCH_PACKAGES)/duckdb ## ingest beside DuckDB, intervals, gates, forecast, simulator: build/bench/numbers.json
	@PYTHONPATH=$(BENCH_PACKAGES) $(BIN)/python -m tests.bench.numbers

measure: install ## size and shape of the package in numbers (docs/decisions/0016)
	@$(BIN)/python -m tests.bench.measure 2>/dev/null

clean: ## remove what was built; the virtual environment stays
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find platform jobs tests requirements -name __pycache__ -prune -exec rm -rf {} +
