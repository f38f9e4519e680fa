# make demo   sets up and runs the main job; figures go to demo-output/
# make test   sets up and passes the tests
# make lint   formatting, linting, types
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := $(wildcard perseus_core/planning/native/*)

# Measured data of the Perseus paper where it lies beside this repository, else a profile of our own.
PUBLISHED := ../shared/data/sosp24
ifneq ($(wildcard $(PUBLISHED)/stage_profile/gpt3-175b+a100_sxm_bf16.csv),)
DEMO_ARGUMENTS := "$(PUBLISHED)/stage_profile/gpt3-175b+a100_sxm_bf16.csv" --blocking-power 83.64 --trust-profile \
  --published "$(PUBLISHED)/published_frontier/a100_sxm_gpt3-175b_bf16_mb24.csv"
else
DEMO_ARGUMENTS := configs/profiles/gpt3-175b_a100_8stages.csv --blocking-power 83.5
endif

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/perseus compare $(DEMO_ARGUMENTS) --microbatches 24 -o demo-output

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt lowtime
	$(BIN)/python -m benchmarks.planner

$(READY): setup.py constraints.txt $(NATIVE)
	@echo "Setting up $(VENV) (once, about a minute) ..."
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools wheel
	@$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable ".[report,gpu,test]"
	@touch $@

clean:
	rm -rf $(VENV) build demo-output *.egg-info perseus_core/planning/*.so
