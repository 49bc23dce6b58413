# make quickstart   install into .venv, train the quickstart, write its report
# make test         install with the test extras, run the tests
# make test-all     the slow ones among them
# make lint         ruff and mypy
# make sbom         what is installed in .venv, as a CycloneDX file
# make audit        advisories against constraints.txt; needs the internet
# make docs         write the pages that are generated from the code
# make site         build the documentation as a site, into site/
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt

SBOM := sbom.cdx.json
ADVISORIES := https://api.osv.dev/v1/query

.PHONY: quickstart test test-all lint docs site sbom audit clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/.installed
	$(BIN)/dgpo quickstart $(ARGS)

# As many files at once as there are cores; in this order, so that the longest do not come last.
test: $(VENV)/.installed-dev
	$(BIN)/pytest -n logical --dist loadfile --no-loadscope-reorder $(ARGS) tests/chaos tests/integration tests/unit

test-all: $(VENV)/.installed-dev $(VENV)/.installed-audit
	$(BIN)/pytest -m "slow or not slow" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/python -m services.config_docs docs/configuration.md
	$(BIN)/python -m services.metrics_docs docs/metrics.md
	$(BIN)/python -m reward_servers.openapi docs/openapi/reward-v1.json

# Validating what the library has made takes it 20 s of the 22.
sbom: $(VENV)/.installed $(VENV)/.installed-audit
	$(VENV)/audit/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --no-validate \
	  --output-file $(SBOM) $(BIN)/python

audit: $(VENV)/.installed-audit
	$(VENV)/audit/bin/python deploy/audit.py constraints.txt $(ADVISORIES)

site: $(VENV)/.installed-dev
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps keep a second call from installing again; a change of the dependencies makes them old.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing into $(VENV) with test extras (a few minutes the first time)"
	$(PIP_INSTALL) -e '.[dev]'
	@# Apart: peft would import it in every process of every run, which takes 2 s each.
	$(PIP_INSTALL) --no-deps --upgrade --target $(VENV)/8bit bitsandbytes
	@touch $(VENV)/.installed $@

# An environment of their own: what describes and audits the dependencies is none of them.
$(VENV)/.installed-audit: constraints.txt | $(BIN)/pip
	@echo "installing cyclonedx-bom and pip-audit into $(VENV)/audit"
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --disable-pip-version-check --quiet -c constraints.txt cyclonedx-bom pip-audit
	@touch $@
