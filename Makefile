# make alone prints the targets. Everything runs in .venv, which is made on first use from constraints.txt.

SHELL := /bin/bash
PYTHON ?= python3
RECIPE ?= cnn
ARGS ?=
BIN := .venv/bin
# OpenMP's threads spin while they wait, which starves the several processes of a test on few cores.
TESTS := OMP_WAIT_POLICY=PASSIVE
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup train test test-faults test-slurm test-min lint check bench bench-gpu clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## make .venv with the pinned versions

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; exit 2; }
	@echo "installing the pinned versions into .venv (once, some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[recipes,plot,test,bench]'
	@touch $@

train: .venv/.installed ## train a recipe: make train RECIPE=mlp ARGS="--lr 3e-3"
	@launch/$(or $(CLUSTER),local).sh $(RECIPE) $(ARGS)

test: .venv/.installed ## run the tests (about 15 minutes on two cores)
	@$(TESTS) $(BIN)/python -m pytest $(TWO_AT_A_TIME) $(ARGS)

test-faults: .venv/.installed ## all of the fault matrix: kills, full disks, hostile files (under an hour)
	@rm -f .faults.jsonl
	@$(TESTS) SCALETRAIN_FAULTS=all SCALETRAIN_FAULTS_REPORT=$(CURDIR)/.faults.jsonl $(BIN)/python -m pytest tests/test_faults_*.py tests/test_benchmarks_run.py $(ARGS)
	@$(BIN)/python -m benchmarks.faults .faults.jsonl --out benchmarks/results/faults.md

test-slurm: .venv/.installed ## start a SLURM of two nodes on this machine and run jobs on it (Debian, as root; four minutes)
	@$(BIN)/python tests/slurm.py
	@$(TESTS) SCALETRAIN_SLURM=1 $(BIN)/python -m pytest -rs tests/test_slurm.py $(ARGS)

test-min: .venv-min/.installed ## run the tests with the oldest versions that pyproject.toml admits
	@$(TESTS) .venv-min/bin/python -m pytest $(TWO_AT_A_TIME) $(ARGS)

.venv-min/.installed: pyproject.toml constraints.txt constraints-min.txt
	@$(PYTHON) -m venv .venv-min
	@.venv-min/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-min.txt -e '.[recipes,plot,test,bench]'
	@touch $@

lint: .venv/.installed ## ruff and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

check: .venv/.installed ## train every recipe at its documented size and hold it to what it expects (minutes)
	@$(BIN)/python -m benchmarks.expectations

bench: .venv/.installed ## measure the loop, saving and resuming beside other libraries (an hour and a half)
	@$(BIN)/python -m benchmarks.step_overhead --out benchmarks/results/step_overhead.md
	@$(BIN)/python -m benchmarks.order_cost --out benchmarks/results/order_cost.md
	@$(BIN)/python -m benchmarks.loading --out benchmarks/results/loading.md
	@$(BIN)/python -m benchmarks.evaluating --out benchmarks/results/evaluating.md
	@$(BIN)/python -m benchmarks.two_processes --out benchmarks/results/two_processes.md
	@$(BIN)/python -m benchmarks.large_map --out benchmarks/results/large_map.md
	@$(BIN)/python -m benchmarks.language --out benchmarks/results/language.md
	@$(BIN)/python -m benchmarks.checkpoint_stall --out benchmarks/results/checkpoint_stall.md
	@$(BIN)/python -m benchmarks.resume_position --out benchmarks/results/resume_position.md
	@$(BIN)/python -m benchmarks.kill_and_resume --out benchmarks/results/kill_and_resume.md

bench-gpu: .venv/.installed ## measure on a CUDA GPU (half an hour): make bench-gpu ARGS="--parts G1,G2"
	@$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu.md $(ARGS)

clean: ## remove the environments and caches, not the runs
	rm -rf .venv .venv-min .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
