# `make` alone prints the targets.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PROFILE ?= auto

# Without an NVIDIA driver, PyTorch's own index has a build without gigabytes of CUDA; where that index cannot be
# reached (asked once, for three seconds), the default one serves.
TORCH_CPU := https://download.pytorch.org/whl/cpu

# Many images set it. Without kept bytecode every process compiles 5,000 files of the libraries anew: importing torch,
# transformers, trl and peft took 37 s instead of 15 on two cores of an EPYC.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint lab data evidence faults results lock clean

help: ## print this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 14

setup: $(READY) ## create .venv with the pinned packages

demo: $(READY) ## run the whole suite on this machine: data, base, full, LoRA, QLoRA, comparison, report
	@$(PY) -m finetune run --profile $(PROFILE)

test: $(READY) ## run the tests, without the slow demo and the GPU
	@$(PY) -m pytest -m "not slow and not gpu and not container" -n auto --dist loadfile --no-loadscope-reorder

lint: $(READY) ## check style and that committed notebooks carry no outputs
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/nbstripout --keep-id --verify notebooks/*.ipynb

lab: $(READY) ## open Jupyter Lab on 127.0.0.1:8888, with a token
	@# Jupyter would ask in a pop-up whether it may fetch its news.
	@mkdir -p $(VENV)/etc/jupyter/labconfig
	@echo '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}' \
		> $(VENV)/etc/jupyter/labconfig/page_config.json
	@# Jupyter asks root for --allow-root. On a rented GPU machine the user is root; the token and 127.0.0.1 protect both.
	@$(VENV)/bin/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.port=8888 --ServerApp.root_dir=$(CURDIR) \
		$(if $(filter 0,$(shell id -u)),--allow-root)

data: $(READY) ## prepare the data
	@$(PY) -m finetune data --profile $(PROFILE)

evidence: $(READY) ## the whole experiment: seeds, learning curve, prompts, losses, engines (options in ARGS)
	@$(PY) -m benchmarks.evidence --profile $(PROFILE) $(ARGS)

faults: $(READY) ## kill, damage and fill tiny runs, and judge what becomes of them
	@$(PY) -m benchmarks.faults $(ARGS)

results: $(READY) ## make reports, README tables and docs/speed.md anew from results/reference, and check the records
	@$(PY) -m finetune results
	@$(PY) -m benchmarks.render

lock: $(READY) ## resolve requirements/base.txt anew: one line a package, with hashes
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate \
		--generate-hashes -o $(VENV)/lock.txt
	sed -e ':line' -e '/\\$$/{N;s/ *\\\n */ /;b line' -e '}' $(VENV)/lock.txt | grep -vE '^(torch|triton|nvidia-[^m]|cuda-)' > requirements/base.txt

clean: ## remove what runs made (data, models, results), but neither .venv nor reference results
	rm -rf datasets/*/ checkpoints/*/ checkpoints/.[!.]*/ adapters/*/ adapters/.[!.]*/ datasets/.*.lock checkpoints/.*.lock
	find results -mindepth 1 -maxdepth 1 -type d ! -name reference -exec rm -rf {} +

# pip installs uv and torch, uv the rest: it takes seconds where pip takes minutes, but does not find the CPU build of
# torch where pip is configured to. uv is told the index that pip uses.
$(READY): requirements/base.txt requirements/torch.txt requirements/uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) (once; about 700 MB of packages)"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@index=$$($(PY) -m pip config get global.index-url 2>/dev/null || true); \
		export UV_DEFAULT_INDEX="$${PIP_INDEX_URL:-$${index:-https://pypi.org/simple}}" UV_PYTHON=$(PY); \
		$(VENV)/bin/uv pip install -q --no-deps --require-hashes -r requirements/base.txt && \
		$(VENV)/bin/uv pip install -q --no-deps --no-build-isolation -e .
	@cpu=$$(command -v nvidia-smi >/dev/null && exit; \
		$(PY) -c 'import urllib.request as r; r.urlopen("$(TORCH_CPU)/torch/", timeout=3)' 2>/dev/null \
		&& echo "--extra-index-url $(TORCH_CPU)"); \
		$(PY) -m pip install -qq --disable-pip-version-check --no-compile $$cpu -r requirements/torch.txt
	@touch $@
