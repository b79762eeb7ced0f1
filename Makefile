# Everything runs in a virtual environment of its own, made on first use from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SOURCES := $(shell find nsm export runtimes quantization -name '*.py' -o -name '*.js' -o -name '*.html' | sort)
CODE := nsm export quantization runtimes tests examples

.DEFAULT_GOAL := help
.PHONY: help setup demo test check format test-long gpu recall compare design docs cpp cpp-check arm64 clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make the virtual environment

# pip compiles one file after the other, so it is told not to. Compiling here on all cores also helps where Python is told
# to write no bytecode: every test that starts a process would compile torch again.
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/(transformers/models|tests?)/' $(VENV)/lib > /dev/null

# A strict editable install links every module, so a module that is new needs a new install: hence their list.
MODULES := $(VENV)/modules-$(shell echo $(SOURCES) | cksum | cut -d' ' -f1)

$(STAMP): pyproject.toml constraints.txt $(MODULES)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --config-settings editable_mode=strict \
		--editable '.[export,onnxruntime,openvino,tensorrt,viz,examples,docs,dev]'
	@$(COMPILE) || true  # packages hold templates that are no Python
	@touch $@

$(MODULES): $(BIN)/python
	@rm -rf $(VENV)/modules-* build && touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("nsm needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

demo: setup  ## train on handwritten digits, export to three targets, compare (about 5 minutes on 2 cores, set-up included)
	$(BIN)/python examples/train_digits.py --output digits.pt
	$(BIN)/nsm-export digits.pt --target onnxruntime --target openvino --target tensorrt --output digits.nsm --force
	$(BIN)/python examples/report_digits.py digits.pt digits.nsm

test: check  ## format, lint, types, and the whole test suite
	$(BIN)/pytest -m "not slow and not gpu" --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 15

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/typecheck.py

test-long: setup  ## the checks that CI has no time for, about an hour on 2 cores (that of Ray needs the extra ray)
	$(BIN)/pytest -m "slow and not gpu" --numprocesses auto --dist loadfile --durations 15

gpu: setup  ## the tests that need an NVIDIA GPU (with the extra gpu in place of onnxruntime)
	$(BIN)/pytest -m gpu

recall: setup  ## train the recall model again that the tests use (tests/data/recall.pt)
	$(BIN)/python examples/train_recall.py --output tests/data/recall.pt

compare: setup  ## compare the NSM with other sequence models on OpenVINO and ONNX Runtime (about 15 minutes on 2 cores)
	$(BIN)/python examples/compare.py --target openvino --output docs/compare-openvino
	$(BIN)/python examples/compare.py --target onnxruntime --output docs/compare-onnxruntime

design: setup  ## what each design choice of a layer costs (about 6 minutes)
	$(BIN)/python examples/design_choices.py --output docs/design-choices.json

format: setup  ## format the code and mend what lint can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis digits.pt *.nsm *.nsm.failed
	find $(CODE) -name __pycache__ -type d -exec rm -rf {} +

docs: setup  ## build the documentation into build/site; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

cpp: setup  ## build the C++ client into build/cpp (needs cmake and a C++ compiler)
	cmake -S examples/cpp -B build/cpp -DCMAKE_BUILD_TYPE=Release \
		-DOpenVINO_DIR="$$($(BIN)/python -c 'import openvino, pathlib; print(pathlib.Path(openvino.__file__).parent / "cmake")')" \
		-DNLOHMANN_JSON="$$($(BIN)/python -c 'import nlohmann_json, pathlib; print(pathlib.Path(nlohmann_json.__path__[0]) / "include")')"
	cmake --build build/cpp --parallel 2

BUNDLE ?= digits.nsm
cpp-check: cpp  ## build the C++ client, replay the golden streams of BUNDLE (digits.nsm, of `make demo`) and time a step
	build/cpp/nsm_client $(BUNDLE) --check --bench 200

arm64: setup  ## check the demo's bundle on arm64 under emulation (Debian, as root; apt-get install qemu-user-static)
	tests/devices/arm64.sh digits.nsm onnxruntime
