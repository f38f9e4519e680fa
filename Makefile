# make demo            sets up, then trains a small GPT pipeline with DeepSpeed on simulated GPUs, before and under a plan
# make demo-megatron   the same with Megatron
# make compare         plans a measured pipeline beside Zeus, EnvPipe and the published plan
# make test            sets up, then passes the tests
# make lint            formatting, linting, types
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE := $(wildcard perseus_core/planning/native/*)

# Measured data of the Perseus paper where it lies beside this repository, else a profile of our own.
PUBLISHED := ../shared/data/sosp24
ifneq ($(wildcard $(PUBLISHED)/stage_profile/gpt3-175b+a100_sxm_bf16.csv),)
COMPARED := "$(PUBLISHED)/stage_profile/gpt3-175b+a100_sxm_bf16.csv" --blocking-power 83.64 --trust-profile \
  --published "$(PUBLISHED)/published_frontier/a100_sxm_gpt3-175b_bf16_mb24.csv"
else
COMPARED := configs/profiles/gpt3-175b_a100_8stages.csv --blocking-power 83.5
endif

.PHONY: demo demo-megatron compare test lint clean

demo: $(READY)
	$(BIN)/python -m demo.run

demo-megatron: $(READY)
	$(BIN)/python -m demo.run_megatron

compare: $(READY)
	$(BIN)/perseus compare $(COMPARED) --microbatches 24 -o demo-output/compare

# Two processes: one for what is tested in real time, one for the rest (tests/conftest.py).
test: $(READY)
	$(BIN)/python -m pytest -n 2 --max-worker-restart 0

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch comes first: DeepSpeed looks for it while it is installed.
$(READY): setup.py constraints.txt $(NATIVE)
	@echo "Setting up $(VENV), once; two minutes after the first download ..."
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "  torch"
	@$(PIP) setuptools wheel torch
	@echo "  DeepSpeed and Megatron-core"
	@$(PIP) deepspeed megatron-core
	@echo "  Perseus"
	@$(PIP) --no-build-isolation --editable ".[report,gpu,test]"
	@touch $@

clean:
	rm -rf $(VENV) build demo-output *.egg-info perseus_core/planning/*.so
