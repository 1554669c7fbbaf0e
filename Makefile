# `make help` lists what there is. Every target does the set-up it needs (scripts/setup).

.DEFAULT_GOAL := all
PYTHON := .venv/bin/python
BENCHES := $(subst _,-,$(patsubst bench/%.py,bench-%,$(shell grep -ls '^if __name__ == ' bench/*.py)))

.PHONY: all
all:  ## set up what the demo needs (the default)
	@scripts/setup demo

.PHONY: demo
demo: all  ## three data centers on this machine, and a request that starts a program
	@.venv/bin/tabane demo

.PHONY: test
test:  ## every test (root: also those with real engines)
	@scripts/setup test
	@scripts/test

.PHONY: check
check:  ## lint, format, types and the import rules, in under a minute
	@scripts/setup check
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(PYTHON) -m pytest -q -p no:cacheprovider tests/test_imports.py tests/test_repo.py

.PHONY: coverage
coverage:  ## every test, with the lines it did not reach
	@scripts/setup test
	@$(PYTHON) -m coverage erase
	@$(PYTHON) -m coverage run -m pytest -q -p no:cacheprovider
	@$(PYTHON) -m coverage combine -q
	@$(PYTHON) -m coverage report --skip-covered --show-missing

.PHONY: bench
bench: $(BENCHES)  ## every benchmark (bench-NAME runs bench/NAME.py alone)

bench-%:
	@scripts/setup bench
	@$(PYTHON) bench/$(subst -,_,$*).py

.PHONY: format
format:  ## let ruff fix and format what it can
	@scripts/setup check
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

.PHONY: lock
lock:  ## write requirements.lock anew
	@scripts/lock

.PHONY: clean
clean:  ## remove caches and what builds and tests wrote; .venv stays
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* htmlcov
	@find src tests bench -name __pycache__ -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean  ## remove .venv too
	@rm -rf .venv

.PHONY: help
help:  ## this list
	@sed -nE 's/^([a-z]+):.*  ## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
