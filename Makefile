# `make help` lists what there is. `make demo` and `make test` need nothing else first: the tools go into .venv/, their
# caches into .cache/, and both are used again afterwards.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq install --constraint constraints.txt
STAMP := $(VENV)/.installed
EXTENSION := .cache/extension.log
LLAVA_EXTENSION := .cache/extension-llava.log
# The original LLaVA needs transformers of its time, and so an environment of its own, on Python 3.12 or older.
LLAVA_VENV := .venv-llava
LLAVA_PY := $(LLAVA_VENV)/bin/python
LLAVA_PIP := $(LLAVA_PY) -m pip --disable-pip-version-check -qq install --constraint constraints-llava.txt
LLAVA_STAMP := $(LLAVA_VENV)/.installed
# Trackers that only `make test-all` needs; they lie over .venv, whose packages they see.
TRACKERS_VENV := .venv-trackers
TRACKERS_PY := $(TRACKERS_VENV)/bin/python
TRACKERS_STAMP := $(TRACKERS_VENV)/.installed
LLAVA_RUNS := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info < (3, 13) else "")' 2>/dev/null)
# So does LLaMA-Factory, on Python 3.11 or newer.
FACTORY_VENV := .venv-llamafactory
FACTORY_PY := $(FACTORY_VENV)/bin/python
FACTORY_PIP := $(FACTORY_PY) -m pip --disable-pip-version-check -qq install --constraint constraints-llamafactory.txt
FACTORY_STAMP := $(FACTORY_VENV)/.installed
FACTORY_RUNS := $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)
# Families of models beyond a dozen: torchvision and timm, over .venv; from Python 3.11 on, as transformers' newest.
FAMILIES_VENV := .venv-families
FAMILIES_PY := $(FAMILIES_VENV)/bin/python
FAMILIES_STAMP := $(FAMILIES_VENV)/.installed
SOURCES := $(wildcard mir_callback llava_integration)

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
# Private, because DeepSpeed fails to start on an extension that another installation has built.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-gpu test-faults checks bench bench-gpu study docs dist clean distclean preflight \
  llava-left-out factory-left-out families-left-out browser-left-out

help: ## show this list
	@echo 'make TARGET [PYTHON=/path/to/python3.10-or-newer]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

install: $(STAMP) ## create .venv with all that is needed (the other targets do so themselves)

demo: $(EXTENSION) ## pre-train a tiny LLaVA under ZeRO-3 and watch its MIR; results in runs/demo/
	@gpus=$$($(PY) -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'); \
	case $$gpus in \
	0) processes=2; export DS_ACCELERATOR=cpu;; \
	1) processes=1;; \
	*) processes=2;; \
	esac; \
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node $$processes examples/tiny_llava_pretrain.py

ifeq ($(LLAVA_RUNS),yes)
LLAVA_READY := $(LLAVA_EXTENSION)
LLAVA_LEFT_OUT :=
else
LLAVA_READY := llava-left-out
LLAVA_LEFT_OUT := --ignore tests/llava
endif

ifeq ($(FACTORY_RUNS),yes)
FACTORY_READY := $(FACTORY_STAMP)
FACTORY_LEFT_OUT :=
FAMILIES_READY := $(FAMILIES_STAMP)
FAMILIES_LEFT_OUT :=
else
FACTORY_READY := factory-left-out
FACTORY_LEFT_OUT := --ignore tests/llamafactory
FAMILIES_READY := families-left-out
FAMILIES_LEFT_OUT := --ignore tests/families
endif

# One from a snap sees neither the tests' folders nor our pipes.
ifneq ($(filter-out /snap/%,$(shell command -v chromium) $(shell command -v google-chrome)),)
BROWSER_READY :=
BROWSER_LEFT_OUT :=
else
BROWSER_READY := browser-left-out
BROWSER_LEFT_OUT := and not browser
endif

# Two processes, each with files of its own: most tests use one core, and fixtures of a file are made once.
PARALLEL := -n 2 --dist loadfile

test: checks $(EXTENSION) $(LLAVA_READY) $(BROWSER_READY) $(FAMILIES_READY) ## the checks, then the fast tests
	$(TESTING) $(PY) -m pytest $(PARALLEL) -m 'not slow and not gpu and not faults and not trackers and not families $(BROWSER_LEFT_OUT)' \
	  $(LLAVA_LEFT_OUT) $(FAMILIES_LEFT_OUT)
ifeq ($(FACTORY_RUNS),yes)
	$(TESTING) $(FAMILIES_PY) -m pytest -m families tests/families/test_families.py -k 'llama4 and value_is_that' # needs torchvision
endif

test-all: checks $(EXTENSION) $(LLAVA_READY) $(FACTORY_READY) $(BROWSER_READY) $(TRACKERS_STAMP) $(FAMILIES_READY) ## the checks, then all tests, the slow ones too
	$(TESTING) $(PY) -m pytest $(PARALLEL) -m 'not gpu and not faults and not trackers and not families $(BROWSER_LEFT_OUT)' \
	  $(LLAVA_LEFT_OUT) $(FACTORY_LEFT_OUT) $(FAMILIES_LEFT_OUT)
	$(TESTING) $(TRACKERS_PY) -m pytest -m trackers tests/training/test_trackers.py
ifeq ($(FACTORY_RUNS),yes)
	$(TESTING) $(FAMILIES_PY) -m pytest $(PARALLEL) -m families tests/families
endif

test-gpu: $(STAMP) ## the tests that need a GPU
	$(PY) -m pytest -m gpu

test-faults: $(EXTENSION) ## break things in real runs: killed ranks, full disks, no memory (about 8 minutes)
	$(TESTING) $(PY) -m pytest tests/faults

llava-left-out:
	@echo 'NOTE: the tests with the original LLaVA are left out: its transformers 4.37.2 needs Python 3.12 or older'

factory-left-out:
	@echo 'NOTE: the tests with LLaMA-Factory are left out: it needs Python 3.11 or newer'

families-left-out:
	@echo 'NOTE: the tests of families of models are left out: they need the transformers of Python 3.11 or newer'

browser-left-out:
	@echo 'NOTE: the tests that open a page in a browser are left out: no Chromium was found; on Debian: apt install chromium'

checks: $(STAMP) ## style, formatting, types, spelling
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(SOURCES)
	$(PY) -m codespell_lib

RESULTS := benchmarks/results
bench: $(STAMP) ## measure solver, evaluation, ranks, memory, sizes on this CPU; tables in benchmarks/results/ (a quarter of an hour)
	$(ON_CPU) $(PY) benchmarks/solver.py --output $(RESULTS)/solver.md
	$(ON_CPU) $(PY) benchmarks/evaluation.py --output $(RESULTS)/evaluation.md
	$(ON_CPU) $(PY) benchmarks/ranks.py --output $(RESULTS)/ranks.md
	$(ON_CPU) $(PY) benchmarks/memory.py --output $(RESULTS)/memory.md
	$(ON_CPU) $(PY) benchmarks/scaling.py --output $(RESULTS)/scaling.md
	$(PY) benchmarks/predict.py --output $(RESULTS)/prediction.md
	$(PY) benchmarks/quote.py

bench-gpu: $(STAMP) ## on a GPU: an evaluation of a 7B model, alone and while it trains under ZeRO, and the parts of one layer
	$(PY) benchmarks/evaluation.py --repeats 3 --device cuda --dtype bfloat16 --hidden 4096 --layers 32 --samples 100 --text 900 \
	  --output $(RESULTS)/gpu_evaluation.md
	$(PY) -m torch.distributed.run --standalone --nproc_per_node 1 benchmarks/training.py --hidden 4096 --layers 32 --samples 100 \
	  --text 900 --train-text 128 --train-batch 4 --steps 9 --every 3 --stages 2 3 --output $(RESULTS)/gpu_training.md
	$(PY) benchmarks/parts.py --output $(RESULTS)/gpu_parts.md
	$(PY) benchmarks/predict.py --output $(RESULTS)/prediction.md
	$(PY) benchmarks/quote.py

study: $(STAMP) ## the 147 small trainings behind docs/evidence.md (two hours on two cores; goes on where it was interrupted)
	$(TESTING) $(PY) -m studies.decisions.study
	$(PY) -m studies.decisions.evidence

docs: $(STAMP) ## write docs/reference.md, and the table of what is supported into docs/integrations.md and README.md
	$(PY) docs/generate.py

WHEEL_VENV := .cache/wheel
dist: $(STAMP) ## build sdist and wheel in dist/, check them, and use the wheel in an empty environment
	@$(PIP) build twine
	rm -rf dist build *.egg-info $(WHEEL_VENV)
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt dist/*.whl
	$(WHEEL_VENV)/bin/python -I .ci/check_wheel.py dist/*.whl
	@grep -q '^SOURCE = "https' setup.py || echo "NOTE: before a release, put the repository's address into setup.py (SOURCE)"

clean: ## remove caches and build products; .venv/ and runs/ stay
	rm -rf .cache build dist *.egg-info .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## also remove .venv/ and runs/
	rm -rf $(VENV) $(LLAVA_VENV) $(FACTORY_VENV) $(TRACKERS_VENV) runs

# The tests are the same everywhere, with a GPU or without.
ON_CPU := DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
# Tiny models: more threads than one wait for each other, and some tests take 20 times as long.
TESTING := $(ON_CPU) OMP_NUM_THREADS=1

# PyTorch goes first, so that nothing else chooses another one. DeepSpeed is a source package and looks at the PyTorch it is
# built with: no build isolation, no extensions built in advance (DS_BUILD_OPS), no search for a CUDA compiler (DS_ACCELERATOR).
$(STAMP): constraints.txt setup.py
	@$(MAKE) --no-print-directory preflight
	@test -x $(PY) || { echo 'creating $(VENV)'; $(PYTHON) -m venv $(VENV); }
	@mkdir -p .cache
	@echo 'installing PyTorch (on Linux its default build is large; once)'
	@$(PIP) 'pip>=22.3' torch
	@echo 'installing DeepSpeed'
	@$(PIP) setuptools wheel ninja numpy
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-build-isolation deepspeed
	@echo 'installing mir-callback with what its demo, tests and checks need'
	@$(PIP) --no-build-isolation --editable '.[demo,test,checks]'
	@touch $@

# DeepSpeed would build this at its first start, in every process at once.
$(EXTENSION): $(STAMP)
$(EXTENSION): BUILDER := $(PY)
$(LLAVA_EXTENSION): $(LLAVA_STAMP)
$(LLAVA_EXTENSION): BUILDER := $(LLAVA_PY)
$(LLAVA_EXTENSION): export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions/$(LLAVA_VENV)
$(EXTENSION) $(LLAVA_EXTENSION):
	@echo "building DeepSpeed's extension for CPU (a minute or two, once)"
	@mkdir -p $(@D)
	@rm -f "$$TORCH_EXTENSIONS_DIR"/*/lock # of a build that was interrupted; the next would wait for it for ever
	@DS_ACCELERATOR=cpu $(BUILDER) -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' >$@.part 2>&1 || \
	  { cat $@.part; exit 1; }
	@mv $@.part $@

$(LLAVA_STAMP): constraints-llava.txt
	@$(MAKE) --no-print-directory preflight
	@test -x $(LLAVA_PY) || { echo 'creating $(LLAVA_VENV)'; $(PYTHON) -m venv $(LLAVA_VENV); }
	@echo 'installing the original LLaVA and what it needs, for its tests'
	@$(LLAVA_PIP) 'pip>=22.3' torch
	@$(LLAVA_PIP) setuptools wheel ninja numpy
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(LLAVA_PIP) --no-build-isolation deepspeed
	@$(LLAVA_PIP) transformers accelerate tokenizers sentencepiece einops pillow matplotlib scipy tqdm psutil requests
	@$(LLAVA_PIP) --no-deps llava-torch
	@touch $@

# LLaMA-Factory imports TorchAudio for data that no test has, and its compiled part, for CUDA, fails beside a PyTorch for CPU.
$(FACTORY_STAMP): constraints-llamafactory.txt
	@$(MAKE) --no-print-directory preflight
	@test -x $(FACTORY_PY) || { echo 'creating $(FACTORY_VENV)'; $(PYTHON) -m venv $(FACTORY_VENV); }
	@echo 'installing LLaMA-Factory and what its training needs, for its tests'
	@$(FACTORY_PIP) 'pip>=22.3' torch
	@$(FACTORY_PIP) transformers accelerate peft datasets av einops fastapi fire omegaconf pillow pydantic pyyaml sentencepiece \
	  sse-starlette tiktoken tyro uvicorn matplotlib scipy jinja2 filelock rich psutil tqdm
	@$(FACTORY_PIP) --no-deps llamafactory trl torchaudio
	@rm -f $(FACTORY_VENV)/lib/python*/site-packages/torchaudio/lib/*.so
	@touch $@

$(TRACKERS_STAMP): constraints-trackers.txt $(STAMP)
	@test -x $(TRACKERS_PY) || { echo 'creating $(TRACKERS_VENV)'; $(PYTHON) -m venv $(TRACKERS_VENV); }
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$($(TRACKERS_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	@echo 'installing MLflow, Trackio and SwanLab, for their tests'
	@$(TRACKERS_PY) -m pip --disable-pip-version-check -qq install --constraint constraints-trackers.txt \
	  mlflow-skinny trackio swanlab
	@touch $@

# torchvision names its PyTorch, and its compiled part, for CUDA, fails beside one for CPU: the tests use its Python part.
$(FAMILIES_STAMP): constraints-families.txt $(STAMP)
	@test -x $(FAMILIES_PY) || { echo 'creating $(FAMILIES_VENV)'; $(PYTHON) -m venv $(FAMILIES_VENV); }
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$($(FAMILIES_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	@echo 'installing torchvision and timm, for the tests of families of models'
	@$(FAMILIES_PY) -m pip --disable-pip-version-check -qq install --no-deps --constraint constraints-families.txt torchvision timm
	@touch $@

preflight:
	@command -v $(PYTHON) >/dev/null || \
	  { echo '$(PYTHON) was not found; name a Python 3.10 or newer: make PYTHON=/path/to/python3'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mir-callback needs Python 3.10 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo '$(PYTHON) comes without venv; on Debian and Ubuntu: apt install python3-venv'; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo 'no C++ compiler was found, and DeepSpeed needs one for its extension; on Debian and Ubuntu: apt install g++'; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || \
	  { echo "$(PYTHON) comes without Python.h, which DeepSpeed's extension needs; on Debian and Ubuntu: apt install python3-dev"; exit 1; }
