# `make` alone lists the verbs. Nothing here needs root; everything is installed into .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
INSTALLED := .venv/.installed
INSTALLED_TRITON := .venv/.installed-triton
INSTALLED_IMAGES := .venv/.installed-images
INSTALLED_BROWSER := .venv/.installed-browser

# What torch pulls in on a machine with a GPU. They come with the torch that requirements-torch.txt resolves to
# (on a CPU build: none), so they must not be in the lock.
TORCH_PACKAGES := torch triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cupti \
	nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand \
	nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink \
	nvidia-nvshmem-cu13 nvidia-nvtx

.PHONY: help install demo test test-slow test-api test-aarch64 test-browser test-faults test-images soak test-gpu lint serve bench bench-gpu bench-kernels bench-likelihood bench-memory bench-operations bench-recipes bench-replay bench-scale bench-service docs clean lock

help:  ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-17s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## create .venv and install what is pinned in requirements*.txt

demo: install  ## train, score and sample through the service on real photographs, into demo_output/
	@$(BIN)/python -m examples.demo

# Two test processes, on any number of cores: while one waits for a process or a lease, the other computes. On a few
# cores, threads that wait for one another cost tenfold: each process has one. The hundreds of processes that the tests
# start would compile our sources again, each for half a second, if no bytecode may be written. UTF-8, whatever the locale.
test: lint $(INSTALLED_TRITON)  ## lint, then run every test but those marked gpu, slow, contract, faults, soak, browser, images and aarch64
	@env -u PYTHONDONTWRITEBYTECODE PYTHONUTF8=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "not gpu and not slow and not contract and not faults and not soak and not browser and not images and not aarch64" \
		|| { echo "make test has failed. One test alone: $(BIN)/python -m pytest 'PATH::NAME', as the lines above list them" >&2; exit 1; }
	@echo "make test has passed. Of what it left out: make test-slow, test-api, test-faults, test-browser, test-images, test-gpu, test-aarch64, soak"

test-slow: install  ## run the tests that take minutes
	@$(BIN)/python -m pytest -m slow

test-api: install  ## schemathesis against our OpenAPI, and 10,000 damaged files, for some minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m contract

test-aarch64: install  ## compile the CPU kernels for aarch64; compare their numbers if qemu-aarch64 is there
	@command -v aarch64-linux-gnu-g++ >/dev/null \
		|| { echo "there is no aarch64-linux-gnu-g++; install Debian's package g++-aarch64-linux-gnu" >&2; exit 1; }
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m aarch64 tests/flowpp/test_aarch64.py

test-browser: $(INSTALLED_BROWSER)  ## the dashboard in headless Chromium, with screenshots in browser_output/
	@rm -rf browser_output
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

test-images: $(INSTALLED_IMAGES)  ## build the images, run the composition on a Docker engine, kill, upgrade, stop, for some minutes
	@$(BIN)/python -m pytest -m images

test-faults: install  ## kill and damage what jobs need, stop training at any time, and print what it cost
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/service/test_faults.py tests/service/test_stops.py tests/service/test_inference_faults.py tests/service/test_redis_states.py

soak: install  ## 30 jobs under random faults for ten minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m soak

test-gpu: install  ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu

lint: install  ## ruff, mypy, and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy api flowpp worker examples benchmarks docs
	@$(BIN)/lint-imports --no-logo

serve: install  ## run the service on http://127.0.0.1:8000 over ./data until Ctrl-C
	@$(BIN)/flowpp serve

bench: install  ## training, likelihood, sampling and memory beside a plain baseline, into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.speed

bench-gpu: install  ## the same on a CUDA device, with TFLOP/s, GB/s and time to bits/dim, into RESULTS.md
	@$(BIN)/python -m benchmarks.gpu

bench-kernels: install  ## each kernel alone beside plain PyTorch, into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.kernels

bench-likelihood: install  ## float32 error, round trips, evaluations of the inverse, bounds: into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.likelihood

bench-memory: install  ## what training takes beside what it is estimated to, into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.memory

bench-operations: install  ## memory and CPU of each process, cost of Redis's durability, into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.operations

bench-recipes: install  ## flips, decay and cooldown beside the plain recipe, into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.recipes

bench-replay: install  ## recorded passes beside the same computed anew, into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.replay

bench-scale: install  ## latency, Redis memory, events and reaper at up to 100,000 jobs, into benchmarks/RESULTS.md
	@$(BIN)/python -m benchmarks.scale

bench-service: install  ## requests/s and latency of likelihood over HTTP beside a plain endpoint, into RESULTS.md
	@$(BIN)/python -m benchmarks.service

docs: install  ## draw docs/architecture.svg, and write the tables of docs/*.md from the code
	@$(BIN)/python -m docs.architecture
	@$(BIN)/python -m docs.configuration
	@$(BIN)/python -m docs.errors
	@$(BIN)/python -m docs.observability
	@$(BIN)/python -m docs.settings

clean:  ## remove .venv, caches, demo_output/, benchmark_output/ and browser_output/; keep data/
	rm -rf .venv demo_output benchmark_output browser_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: install  ## compile the requirements anew, keeping versions where possible
	@$(BIN)/uv pip compile pyproject.toml --quiet --all-extras --python-version 3.11 --generate-hashes --no-header \
		--no-annotate -c requirements-torch.txt $(TORCH_PACKAGES:%=--no-emit-package %) -o requirements.txt
	@$(BIN)/uv pip compile pyproject.toml --quiet --extra api --extra worker --extra tracing --extra build \
		--python-version 3.11 --generate-hashes --no-header --no-annotate -c requirements.txt \
		-c requirements-torch.txt $(TORCH_PACKAGES:%=--no-emit-package %) -o requirements-service.txt
	@! grep -nE '^(nvidia|cuda|triton|torch)' requirements.txt || { echo 'add these to TORCH_PACKAGES' >&2; exit 1; }
	@{ echo '# What drives Chromium in `make test-browser`. `make lock` writes this file.'; \
		echo 'playwright>=1.60' | $(BIN)/uv pip compile - --quiet --python-version 3.11 --generate-hashes --no-header \
			--no-annotate -c requirements.txt; } >requirements-browser.tmp
	@mv requirements-browser.tmp requirements-browser.txt

# Done last, so that an interrupted installation is taken up again.
$(INSTALLED): requirements.txt requirements-torch.txt pyproject.toml
	@python=; for candidate in $${PYTHON:-python3.11 python3}; do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "flowpp needs Python 3.11 or newer: neither python3.11 nor python3 is one. Install it, or name it: make install PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then echo "creating .venv with $$($$python --version)"; "$$python" -m venv .venv; fi
	@echo "installing the packages of requirements.txt, each checked by hash"
	@$(PIP) --require-hashes -r requirements.txt
	@echo "installing torch, which is large"
	@$(PIP) -r requirements-torch.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@echo "compiling the CPU kernels"
	@$(BIN)/python -m flowpp.native >/dev/null || true
	@touch $@
	@echo "installed into .venv"

$(INSTALLED_IMAGES): $(INSTALLED) requirements-images.txt
	@$(PIP) --require-hashes -r requirements-images.txt
	@touch $@

$(INSTALLED_TRITON): $(INSTALLED) requirements-triton.txt
	@echo "installing Triton, whose interpreter runs the tests of the GPU kernels"
	@$(PIP) -r requirements-triton.txt
	@touch $@

$(INSTALLED_BROWSER): $(INSTALLED) requirements-browser.txt
	@echo "installing Playwright; it drives the Chromium that CHROMIUM names, or the system's"
	@$(PIP) --require-hashes -r requirements-browser.txt
	@touch $@
