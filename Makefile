# make help lists the targets. PYTHON picks the interpreter that .venv is made from:
#   make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs clean $(VENV)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.$$()A-Z]+:.*## / { sub(/\$$\(VENV\)/, "$(VENV)", $$1); printf "  %-8s %s\n", $$1, $$2 }' Makefile

$(VENV): $(STAMP) ## make the environment: the versions pinned in requirements.txt

# The binaries run from the root of the repository, so nothing but dependencies is installed.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.11 or newer is needed." \
	    "Name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the packages of requirements.txt into $(VENV) (minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(STAMP) ## fit and score the demonstration set
	$(BIN)/python -m experiments.demo

test: $(STAMP) ## run the tests (ARGS are passed on to pytest)
	$(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(STAMP) ## write the API reference, from the docstrings, to build/docs
	$(BIN)/python -m pdoc --docformat google --no-show-source --output-directory build/docs \
	  inreach_jax $(subst /,.,$(basename $(wildcard inreach_jax/[a-z]*.py inreach_jax/*/[a-z]*.py)))
	@echo "open build/docs/inreach_jax.html"

clean: ## remove the environment and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
