# `make help` lists the targets. Variables: PYTHON (what makes .venv), ONLY=1, GPUS=n, REV=…, PROFILE=…, FORCE=1, OUT=…,
# KEY=…, KIND=…, ROW=n, SPLIT=…, TOKENS=…, MINUTES=n, STAGE=…, CASES=n, SEED=n, DATA=…, MODEL=…, LABEL=…,
# PORT=n, OF=…, SORT=…, WHERE=…, COUNT=n, N=n.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv/.complete
export PATH := $(CURDIR)/.venv/bin:$(PATH)
TORCHRUN := torchrun --standalone --nproc_per_node
# What a user gives is text: no `$` in it is make's, and a recipe takes it from the environment, not from its own line.
USER_VARIABLES := PYTHON ONLY GPUS REV PROFILE FORCE OUT KEY MINUTES STAGE KIND ROW SPLIT TOKENS DATA MODEL LABEL PORT
USER_VARIABLES += OF SORT WHERE COUNT N
MINUTES ?= 240
N ?= 5
$(foreach name,$(USER_VARIABLES),$(eval override $(name) := $$(value $(name))))
export PYTHON REV PROFILE OUT KEY MINUTES STAGE KIND ROW SPLIT TOKENS DATA MODEL LABEL PORT OF SORT WHERE COUNT N
quoted = '$(subst ','\'',$(1))'
# GPUS=n starts the stages that compute on n processes of this machine. It changes no stage's identity.
ifneq ($(GPUS),)
export LAUNCH := $(TORCHRUN)=$(GPUS) -m
endif

# A mistake is told before anything is installed or run.
ifneq ($(and $(GPUS),$(shell case $(call quoted,$(GPUS)) in (gpu|auto) ;; (0*|*[!0-9]*) echo wrong;; esac)),)
$(error GPUS is the number of processes, at least 1, or gpu for one on each: not '$(GPUS)')
endif
ifneq ($(and $(ONLY),$(filter repro ppo grpo dpo,$(MAKECMDGOALS))),)
$(error ONLY=1 runs one step on what is there, and '$(MAKECMDGOALS)' is more than one: name the step)
endif
ifneq ($(and $(filter metrics-diff plots,$(MAKECMDGOALS)),$(if $(REV),,missing)),)
$(error say which revision to compare with, for instance: make $(MAKECMDGOALS) REV=main)
endif
ifneq ($(and $(filter use,$(MAKECMDGOALS)),$(if $(PROFILE),,missing)),)
$(error say which profile, for instance: make use PROFILE=default. There are: default $(patsubst profiles/%.yaml,%,$(wildcard profiles/*.yaml)))
endif
ifneq ($(and $(filter join,$(MAKECMDGOALS)),$(if $(STAGE),,missing)),)
$(error say which stage the first machine runs, for instance: make join STAGE=train_sft)
endif
ifneq ($(and $(filter preview,$(MAKECMDGOALS)),$(if $(KIND),,missing)),)
$(error say which rows, for instance: make preview KIND=sft ROW=3. There are: sft preference unpaired prompts)
endif
ifneq ($(and $(filter samples,$(MAKECMDGOALS)),$(if $(OF),,missing)),)
$(error say of which policy, for instance: make samples OF=grpo SORT=-score WHERE='kl > 2' COUNT=5)
endif
ifneq ($(and $(filter bench,$(MAKECMDGOALS)),$(if $(DATA),,missing)),)
$(error say which pairs, for instance: make bench DATA='hh=…/test.jsonl.gz demo=…/dpo_en_demo.json')
endif

# Brings the stages $(1) up to date, then drops training state that dvc.lock has made redundant. All settings are
# checked first: by the first stage of the graph, which `--single-item` would leave out. DVC runs stages that do not
# depend on each other, and lists them in dvc.lock, in an order that is up to Python's hash seed. Nor can it read a
# dvc.lock that it was killed in the middle of writing. Of a group without entries it would run the whole graph.
dvc_repro = PYTHONHASHSEED=0 .venv/bin/dvc repro
repro = .venv/bin/python -m stages.tools.mend_lock && $(if $(ONLY),$(dvc_repro) code_manifest && )\
  $(if $(1),targets="$$(.venv/bin/python -m stages.tools.targets $(1))" && )\
  $(dvc_repro) $(if $(ONLY),--single-item) $(if $(1),$$targets) && .venv/bin/python -m stages.tools.prune_scratch

.PHONY: help setup repro tokenize train-sft train-rm sample-pairs pass-rates ref-logprobs train-dpo train-unpaired train-ppo train-grpo evaluate \
        report ppo grpo dpo metrics metrics-diff plots dag status lineage use fetch explain schemas join preview samples serve-rm test test-fast fuzz prove soak bench \
        pass-cost losses frontier seeds lint clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'With any step: ONLY=1 runs it alone, on what is there; GPUS=n starts it on n processes.'

setup: $(VENV) ## Make .venv from requirements.lock (PYTHON=python3.12 picks the Python)

repro: $(VENV) ## Bring everything up to date, to the report
	$(call repro)

tokenize: $(VENV) ## Up to the token tables of all three kinds of data
	$(call repro,tokenize_data)

train-sft: $(VENV) ## Up to the supervised models: all of the section, as with the next ones
	$(call repro,train_sft)

train-rm: $(VENV) ## Up to the reward models
	$(call repro,train_rm)

sample-pairs: $(VENV) ## Up to the rows made of policies' own replies
	$(call repro,sample_pairs)

pass-rates: $(VENV) ## Up to the prompts that a policy finds neither too easy nor too hard
	$(call repro,pass_rates)

ref-logprobs: $(VENV) ## Up to the reference log-probs that DPO and train-unpaired need
	$(call repro,ref_logprobs ref_logprobs_unpaired)

train-dpo: $(VENV) ## Up to the DPO policies
	$(call repro,train_dpo)

train-unpaired: $(VENV) ## Up to the policies trained on unpaired replies (KTO, BCO, APO)
	$(call repro,train_unpaired)

train-ppo: $(VENV) ## Up to the PPO policies
	$(call repro,train_ppo)

train-grpo: $(VENV) ## Up to the GRPO policies
	$(call repro,train_grpo)

evaluate: $(VENV) ## Up to the evaluation of every policy and reward model
	$(call repro,evaluate score_samples evaluate_rm)

report: $(VENV) ## Up to metrics/report.html
	$(call repro,report)

ppo: $(VENV) ## The PPO branch alone, up to its evaluation
	$(call repro,evaluate@ppo score_samples@ppo)

grpo: $(VENV) ## The GRPO branch alone, up to its evaluation
	$(call repro,evaluate@grpo score_samples@grpo)

dpo: $(VENV) ## The DPO branch alone, up to its evaluation
	$(call repro,evaluate@dpo score_samples@dpo)

metrics: $(VENV) ## Print the metrics
	.venv/bin/dvc metrics show

metrics-diff: $(VENV) ## Compare the metrics here with those of a revision: REV=main
	set -f; .venv/bin/dvc metrics diff $$REV

plots: $(VENV) ## Draw the curves of revisions, branches or experiments and those here: REV='main exp-a exp-b'
	@set -f; set -- $$REV; for rev; do shift; set -- "$$@" --rev "$$rev"; done; \
	  .venv/bin/python -m stages.tools.plot_curves "$$@" --rev workspace --out plots/curves.html

dag: $(VENV) ## List the stages, and after which others each one runs (`dvc dag` draws it, very wide)
	@.venv/bin/dvc dag --dot --collapse-foreach-matrix | awk -F '"' '\
	  /->/ { after[$$4] = after[$$4] " " $$2; stages[$$2]; stages[$$4]; from[NR] = $$2; to[NR] = $$4 } \
	  END { for (round in stages) for (i in from) if (depth[to[i]] <= depth[from[i]]) depth[to[i]] = depth[from[i]] + 1; \
	        for (stage in stages) printf "%d\t%-14s %s\n", depth[stage], stage, after[stage] }' | sort -n | cut -f 2

status: $(VENV) ## Say which stages are stale, and why
	.venv/bin/python -m stages.code_manifest --compare
	.venv/bin/dvc status

lineage: $(VENV) ## Say where a checkpoint comes from, and whether it is as recorded: OUT=models/ppo (else all models)
	.venv/bin/python -m stages.tools.show_lineage $(if $(OUT),"$$OUT")

use: $(VENV) ## Write params.yaml from a profile: PROFILE=default (FORCE=1 drops edits made by hand)
	.venv/bin/python -m stages.tools.use_profile --profile "profiles/$$PROFILE.yaml" $(if $(FORCE),--drop-edits)

fetch: $(VENV) ## Download and check all that params.yaml names of the Hub; then HF_HUB_OFFLINE=1 make repro needs no network
	.venv/bin/python -m stages.tools.fetch

preview: $(VENV) ## Show a row as its tokens, coloured by prompt, trained and masked: KIND=sft ROW=3 (SPLIT=test TOKENS=data/sampled/first)
	.venv/bin/python -m stages.tools.preview_row --kind "$$KIND" $(if $(ROW),--row "$$ROW") $(if $(SPLIT),--split "$$SPLIT") $(if $(TOKENS),--tokens "$$TOKENS")

samples: $(VENV) ## Show what a policy wrote in training: OF=grpo (SORT=-score WHERE='kl > 2' COUNT=5)
	.venv/bin/python -m stages.tools.show_samples --of "$$OF" $(if $(SORT),--sort "$$SORT") $(if $(WHERE),--where "$$WHERE") $(if $(COUNT),--count "$$COUNT")

serve-rm: $(VENV) ## Serve a reward model on loopback by OpenRLHF's /get_reward: MODEL=models/rm PORT=5000 (LABEL=POSITIVE)
	.venv/bin/python -m stages.tools.serve_reward --model "$${MODEL:-models/rm}" $(if $(PORT),--port "$$PORT") $(if $(LABEL),--label "$$LABEL")

explain: $(VENV) ## Say what a section, block or key may hold: KEY=train_dpo.dpo.loss, KEY=runtime.default.threads (KEY= lists them)
	.venv/bin/python -m stages.tools.explain $(if $(KEY),"$$KEY")

schemas: $(VENV) ## Write schemas/, by which editors complete and check params.yaml and runtime.yaml
	.venv/bin/python -m stages.tools.write_schemas

join: $(VENV) ## On another machine: take part in a stage that the first one runs: STAGE=train_sft, same LAUNCH
	.venv/bin/python -m stages.code_manifest
	.venv/bin/python -m stages.tools.join_stage --stage "$$STAGE"

# Two at a time, each file's tests in one process; a thread that waits lets the others have its core.
test: $(VENV) ## Run all tests
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -q -rs --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV) ## Run the tests that take seconds
	.venv/bin/python -m pytest -q -m 'not slow'

CASES ?= 3600
SEED ?= 1
fuzz: $(VENV) ## Meet the stages with wrong and odd inputs, and write down what came of it (an hour): CASES=n, SEED=n
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.fuzz.run --cases $(CASES) --seed $(SEED) --table tests/fuzz/table.md

prove: $(VENV) ## Kill every stage in every way, run each in every way, and write down what came of it (one to three hours)
	.venv/bin/python -m tests.proofs.kill_matrix --table tests/proofs/kill_matrix.md
	rm -rf .scratch/equivalence && mkdir -p .scratch/equivalence
	.venv/bin/python $(EQUIVALENCE)
	.venv/bin/python $(EQUIVALENCE) --precision fp64 bf16 --without-lora
	.venv/bin/$(TORCHRUN)=2 $(EQUIVALENCE)
	.venv/bin/$(TORCHRUN)=2 $(EQUIVALENCE) --precision bf16 --without-lora
	.venv/bin/$(TORCHRUN)=4 $(EQUIVALENCE) --without-lora --only 'plain torch' 'ZeRO 1' 'ZeRO 3'
	rm -rf .scratch/world-sizes
	.venv/bin/python -m tests.proofs.world_sizes .scratch/world-sizes --table tests/proofs/world_sizes.md
	rm -rf .scratch/same-bytes
	.venv/bin/python -m tests.proofs.same_bytes .scratch/same-bytes --table tests/proofs/same_bytes.md
	rm -rf .scratch/online-rounds
	.venv/bin/python -m tests.proofs.online_rounds .scratch/online-rounds --table tests/proofs/online_rounds.md
	.venv/bin/python -m tests.proofs.engine_correction --table tests/proofs/engine_correction.md
	rm -rf .scratch/arithmetic-task
	.venv/bin/python -m tests.proofs.arithmetic_task .scratch/arithmetic-task --table tests/proofs/arithmetic_task.md
	rm -rf .scratch/positive-reviews
	.venv/bin/python -m tests.proofs.positive_reviews .scratch/positive-reviews --table tests/proofs/positive_reviews.md

EQUIVALENCE = -m tests.proofs.equivalence .scratch/equivalence/project \
  --out .scratch/equivalence/measured.json --table tests/proofs/equivalence.md

soak: $(VENV) ## The same with one seed after the other: MINUTES=240
	.venv/bin/python -m tests.proofs.kill_matrix --minutes "$$MINUTES" --kills 6 --seed 1000 --table tests/proofs/kill_soak.md

# TRL in an environment of its own.
TRL := .scratch/trl
$(TRL)/.complete: benchmarks/requirements-trl.txt | $(VENV)
	.venv/bin/python -m venv --clear $(TRL)
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/requirements-trl.txt
	@touch $@

bench: $(VENV) $(TRL)/.complete ## Time training steps beside TRL's and write benchmarks/against_trl.md: DATA='NAME=PATH …' of pairs
	@set -f; set -- $$DATA; for one do shift; set -- "$$@" --data "$$one"; done; \
	  .venv/bin/python -m benchmarks.against_trl --trl $(TRL)/bin/python "$$@"

pass-cost: $(VENV) ## Measure runtime.yaml: pass_cost on this machine: MODEL=models/base, and STAGE=… (else train_dpo)
	.venv/bin/python -m benchmarks.pass_cost "$${MODEL:-models/base}" $(if $(STAGE),--stage "$$STAGE")

losses: $(VENV) ## Train with every preference loss on the pairs here, and write benchmarks/loss_table.md
	.venv/bin/python -m benchmarks.loss_table --seeds 18 --seeds 19

frontier: $(VENV) ## Reward and gold utility against KL, of policies through training and of best-of-n: benchmarks/frontier.md
	.venv/bin/python -m benchmarks.frontier

seeds: $(VENV) ## Train DPO, PPO and GRPO with N seeds each (N=5), and print means with Student's intervals
	.venv/bin/python -m stages.code_manifest
	.venv/bin/python -m stages.tools.repeat_seeds --count "$$N"

lint: $(VENV) ## Check style, format and types
	.venv/bin/ruff check benchmarks rewards stages tests
	.venv/bin/ruff format --check benchmarks rewards stages tests
	.venv/bin/pyrefly check --summary=none

clean: ## Remove training state (a killed run then starts anew), half-written outs and caches; data/, models/ and answers of reward servers stay
	rm -rf plots .pytest_cache .ruff_cache
	test ! -d .scratch || find .scratch -mindepth 1 -maxdepth 1 ! -name runs.jsonl ! -name answers.sqlite -exec rm -rf {} +
	find . -path ./.venv -prune -o -path ./.dvc -prune -o -path ./.git -prune -o \
	  \( -name __pycache__ -o -name '.*.partial' \) -prune -exec rm -rf {} +
	@test -z "$$STAGEWISE_SCRATCH" || echo "kept: training state in $$STAGEWISE_SCRATCH"

# Everything but torch comes with hashes; --no-deps, or pip would add what no lock names. setuptools is first, as two
# packages are published as source alone and are built with it. torch has no hash: its builds for CUDA and for the CPU
# are of one version. CUDA's packages follow where the torch that came asks for them.
LOCKS := requirements.lock requirements-torch.lock requirements-cuda.lock
INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
$(VENV): $(LOCKS)
	@version=$$("$$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	case "$$version" in 3.11|3.12|3.13) ;; *) \
	  echo "error: Python 3.11, 3.12 or 3.13 is needed, and '$$PYTHON' is $${version:-missing};" \
	    "name another, for instance: make setup PYTHON=python3.12" >&2; exit 2;; \
	esac; \
	echo "Installing $(LOCKS) into .venv for Python $$version; this takes some minutes."; \
	.venv/bin/python -m pip --version 2>/dev/null | grep -q "(python $$version)" || "$$PYTHON" -m venv --clear .venv
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > .venv/setuptools.lock
	$(INSTALL) --require-hashes --requirement .venv/setuptools.lock
	$(INSTALL) --require-hashes --no-build-isolation --requirement requirements.lock
	$(INSTALL) --requirement requirements-torch.lock
	@if .venv/bin/python -c 'import sys; from importlib.metadata import requires; sys.exit("nvidia-" not in str(requires("torch")))'; \
	  then set -x; $(INSTALL) --require-hashes --requirement requirements-cuda.lock; fi
	@touch $@
