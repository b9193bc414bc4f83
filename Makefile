# The two commands are `make book` and `make test`; the first target that needs it sets up .venv from requirements.lock.
PYTHON ?= python3
PROFILE ?= smoke
SHOW ?= auto
CHAPTER ?=
RUNS ?= 100
SUITE ?= attacks detection rejection
DEFENCE ?= book/my_defence.py
ARENA ?=
CLUSTER ?=

BIN := .venv/bin
READY := .venv/.ready
PEERS := _build/bench-peers/.ready
HELPERS := $(BIN)/python -m helpers
CHAPTERS := $(foreach name,$(CHAPTER),--chapter $(name))

export PYTHONUTF8 := 1
ifneq ($(HELPERS_DATA),)
export HELPERS_DATA := $(if $(filter /%,$(firstword $(HELPERS_DATA))),,$(CURDIR)/)$(HELPERS_DATA)
endif

ifneq ($(CLUSTER),)
export HELPERS_CLUSTER := $(CLUSTER)
endif

.DEFAULT_GOAL := help
.PHONY: help book site test paper arena bench soak lint address clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(READY) ## execute the chapters and render the site [PROFILE=smoke|quick|paper SHOW=auto|run CHAPTER=02]
	@$(HELPERS) book --profile $(PROFILE) --show $(SHOW) $(CHAPTERS)

site: $(READY) ## render what the repository keeps, without executing anything: seconds
	@$(HELPERS) site

test: $(READY) ## run every test, the notebooks' smoke runs and the rendered site included
	@$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(PYTEST)

paper: $(READY) ## run the paper profile for hours, resumable, and put its results under book/ [CHAPTER=02 CLUSTER=tcp://host:8786]
	@$(HELPERS) paper $(CHAPTERS)

arena: $(READY) ## attack a defence of your own [DEFENCE=my_defence.py ARENA="--data mnist --norm l2 --eps 1.5 --images 100"]
	@$(HELPERS) arena "$(DEFENCE)" $(ARENA)

bench: $(PEERS) ## measure attacks, detectors and SVMs against the plain way, attacks against AutoAttack, or a cluster [SUITE=strength|scale]
	@for suite in $(SUITE); do \
	  PYTHONPATH="_build/bench-peers$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python tests/benchmarks/bench_$$suite.py $(BENCH) || exit; done

soak: $(READY) ## run chapters over seeds, threads, processors and Pythons, for hours, resumable [RUNS=100]
	@$(BIN)/python tests/soak.py --runs $(RUNS)

lint: $(READY) ## check style, spelling, notebooks without outputs and the workflows
	@$(BIN)/ruff check .
	@$(BIN)/codespell
	@$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb
	@$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

address: $(READY) ## write the repository's address to all files that name it [URL=https://github.com/me/repo]
	@$(HELPERS) address "$(URL)"

clean: ## remove what was made, except .venv and what paper runs go on from: _build/units, and the files they name
	@[ ! -d _build ] || find _build -mindepth 1 -maxdepth 1 \
	  ! -name .lock ! -name units ! -name networks ! -name defences -exec rm -rf {} +

$(PEERS): tests/benchmarks/requirements.lock $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade \
	  --target $(@D) --requirement $<
	@touch $@

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) comes without venv; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Setting up .venv from requirements.lock (once, two to three minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
