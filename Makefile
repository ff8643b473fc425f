# `make` alone lists what there is. Settings: make VAR=value, the environment, or .env (for demo, run and install).
PYTHON ?= python3
PG ?= 18
JOBS ?= 4
PY := .venv/bin/python
COMPOSE := docker compose
DISTRIBUTED := $(COMPOSE) --profile distributed

.DEFAULT_GOAL := help
.PHONY: help venv demo run install test check bundle try-bundle build bench bench-compare chaos chaos-mutants sql-docs screenshot \
        docker-build docker-up docker-logs docker-up-dist docker-logs-dist docker-down clean

# What the shell exports wins over .env, hence ?=. Tests and checks never see .env.
ifneq ($(and $(wildcard .env),$(filter demo run install,$(MAKECMDGOALS))),)
-include .venv/env.mk
endif
.venv/env.mk: .env
	@mkdir -p .venv
	@sed -nE -e 's/\$$/$$$$/g; s/#/\\#/g' -e "s/^([A-Z][A-Z0-9_]*)=[\"']?([^\"']*)[\"']?$$/export \1 ?= \2/p" $< > $@

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

.venv/.run: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.dev: .venv/.run requirements-dev.txt
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

venv: .venv/.dev ## make .venv, with what tests and checks need

demo: .venv/.run ## watch it run real work; ARGS=--exit ends it after the summary
	@$(PY) examples/demo.py $(ARGS)

run: .venv/.run ## run a worker, on DATABASE_URL or an embedded PostgreSQL
	@$(PY) orchestrator.py $(ARGS)

install: .venv/.run ## install or upgrade the schema
	@$(PY) orchestrator.py install $(ARGS)

# Every process imports all test files: kept compiled, whatever the shell says, they take it 3 seconds instead of 7.
test: .venv/.dev ## run the tests on a real PostgreSQL; PG=16|17|18, ARGS="-k claim"
	PG=$(PG) PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/.dev ## ruff, mypy, the house rules, and whether dist/orchestrator.py is up to date
	$(PY) -m ruff check .
	$(PY) -m mypy --strict orchestrator.py handlers.py tools/bundle.py tools/lint_house.py
	$(PY) tools/lint_house.py
	$(PY) tests/lint_sql.py
	$(PY) tools/bundle.py --check

bundle: .venv/.run ## write dist/orchestrator.py: one file, the SQL and the page inside; commit it
	$(PY) tools/bundle.py

try-bundle: .venv/.run ## run dist/orchestrator.py alone in an empty folder
	tools/try_bundle.sh

build: bundle .venv/.dev ## write the bundle, and dist/*.whl that holds it
	rm -f dist/*.whl
	$(PY) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist

bench: .venv/.dev ## measure; WORKLOAD=drain for one of them
	$(PY) benchmarks/bench.py $(WORKLOAD) $(ARGS)

bench-compare: .venv/.dev ## measure against another revision, run by run; BASE=rev
	$(PY) benchmarks/bench.py --compare $(BASE) $(WORKLOAD) $(ARGS)

chaos: .venv/.dev ## kill, stop and disconnect everything; nothing may be lost (long)
	$(PY) tests/chaos/chaos.py $(ARGS)

chaos-mutants: .venv/.dev ## break a copy of the program on purpose; the tests must notice
	$(PY) tests/chaos/mutants.py $(ARGS)

sql-docs: .venv/.dev ## write the generated tables of docs/
	$(PY) tools/sql_docs.py

screenshot: .venv/.dev ## take the README's picture of the page (needs chromium)
	$(PY) tools/screenshot.py

docker-build: ## build the image
	docker build -t orchestrator .

docker-up: ## PostgreSQL and one worker in containers
	$(COMPOSE) up -d --build --wait

docker-logs: ## follow their logs
	$(COMPOSE) logs -f

docker-up-dist: ## PostgreSQL, three workers, Prometheus and Grafana
	$(DISTRIBUTED) up -d --build --wait --scale orchestrator=0

docker-logs-dist: ## follow their logs
	$(DISTRIBUTED) logs -f

docker-down: ## stop the containers; the data stays
	$(DISTRIBUTED) down

clean: ## remove .venv, wheels and caches; dist/orchestrator.py and .orchestrator, the embedded database, stay
	rm -rf .venv dist/*.whl .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
