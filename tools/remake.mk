# The tiny models, the shipped selectors and the tables of docs/accuracy.md anew, on the GPUs of one host:
#
#   make -f tools/remake.mk -j DATA=TEXT.gz OUT=FOLDER [models|selectors|tables]
#
# OUT/models, OUT/selectors/MODEL, OUT/tables/MODEL/TABLE/accuracy.md hold the results, OUT/logs what the programs said.
# What is finished is not run again: after an interrupt the same command goes on (but for pretraining, which begins anew). Commands wait
# for GPUs through tools/on_gpu.py. SMOLLM2: the folder that tools/convert_gguf.py wrote; empty: without it.
DATA ?= $(error DATA: give the text that models and selectors are trained on, a file or .gz)
OUT ?= out/remake
PYTHON ?= python3
export SPOT_BUILD ?= $(firstword $(wildcard $(CURDIR)/build/gpu $(CURDIR)/build/cpu))
SMOLLM2 ?= $(wildcard build/smollm2)
DTYPE ?= bfloat16

# Pretraining goes on from the shipped models (INIT empty: from random weights). The hybrid learns less from a token and takes all GPUs
# that tiny-qwen3 leaves.
INIT ?= models/
# KEEP: models of INIT that are not trained on. WALL_qwen3, WALL_qwen3_5: seconds for one of them, in place of WALL.
KEEP ?=
WALL ?= 560
EVAL_SECONDS ?= 50
WORKERS ?= 14
SEED ?= 21
PRETRAIN ?=
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c .)
HYBRID_GPUS ?= $(shell echo $$(($(GPUS) > 2 ? $(GPUS) - 1 : 1)))
PHASES_qwen3 ?= 512:.1,1024+2048:.15,512+1024+4096:.2,1024+4096+16384:.25,4096+16384+32768+65536:.3
PHASES_qwen3_5 ?= 512+1024+2048:.2,1024+4096:.2,1024+4096+16384:.25,4096+16384+32768:.35

# Selectors. A step of the hybrid's takes longer: fewer of them.
LENGTH ?= 4096
LONGEST ?= 32768
STEPS_tiny-qwen3 ?= 600
STEPS_tiny-qwen3.5 ?= 170
STEPS_smollm2 ?= 300
# SmolLM2's selector sees contexts of all these lengths, as many of each.
MIX_smollm2 ?= --length-mix 1024:1,2048:1,4096:1
DOCUMENTS ?= 4000
DISTILL ?= --held-out-sequences 8 --held-out-every 20 --store bfloat16
# Preset paper, which begins with random weights, has its own, sparse loss.
LOSS_spot ?= --loss dense
RATE_spot ?= 3e-3
RATE_paper ?= 2e-3

# Tables. JOBS processes a table and SHARE a GPU at a time.
SAMPLES ?= 17
SEQUENCES ?= 2
JOBS ?= 24
SHARE ?= 18
RULES ?= k=512,k=1024,k=2048,k=4096,k=10%,k=25%,k=50%,k=75%,p=0.7,p=0.8,p=0.9
SIX ?= niah_multikey_1,niah_multikey_2,niah_multivalue,niah_multiquery,vt,qa_1
OTHER ?= niah_single_1,niah_single_2,niah_single_3,niah_multikey_3,cwe,fwe,qa_2

DONE := $(OUT)/done
ON := $(PYTHON) tools/on_gpu.py
TINY := tiny-qwen3 tiny-qwen3.5
SELECTORS := $(foreach model,$(TINY),$(model)-spot $(model)-paper) $(if $(SMOLLM2),smollm2-spot)
TABLES := $(foreach model,$(TINY),$(foreach table,spot paper other sparse text,$(model)-$(table))) $(if $(SMOLLM2),smollm2-needles smollm2-text)

.PHONY: tables selectors models
tables: $(TABLES:%=$(DONE)/table-%)
selectors: $(SELECTORS:%=$(DONE)/selector-%)
models: $(TINY:%=$(DONE)/model-%)

# Every target is the mark that its COMMAND has ended well.
$(DONE)/%:
	@mkdir -p $(OUT)/logs $(OUT)/models $(DONE)
	@echo "$$(date +%T) $*"
	@{ $(COMMAND); } >$(OUT)/logs/$*.log 2>&1 || { echo "error: $* failed, see $(OUT)/logs/$*.log" >&2; exit 1; }
	@touch $@
	@echo "$$(date +%T) $* is done"

# Text for the selectors. The tokenised text, which pretraining reads too, is made here.
$(DONE)/text: private COMMAND = $(call text_of,text,$(LENGTH),1)
$(DONE)/text-smollm2: private COMMAND = $(call text_of,text-smollm2,4300,7)
$(DONE)/text-smollm2: $(DONE)/text
text_of = $(PYTHON) tools/retrieval_text.py --data $(DATA) --work $(OUT)/tokens --out $(OUT)/$(1) --documents $(DOCUMENTS) --tokens $(2) --seed $(3)

$(TINY:%=$(DONE)/model-%): $(DONE)/text
$(DONE)/model-tiny-qwen3: private COMMAND = $(call pretrain,$(ON) -- $(PYTHON),qwen3,tiny-qwen3,0.7)
$(DONE)/model-tiny-qwen3.5: private COMMAND = $(call pretrain,$(ON) --gpus $(HYBRID_GPUS) -- $(PYTHON) $(TORCHRUN),qwen3_5,tiny-qwen3.5,1.2)
$(KEEP:%=$(DONE)/model-%): private COMMAND = ln -sfn $(abspath $(or $(INIT),$(error KEEP: INIT names no folder))$(@F:model-%=%)) $(OUT)/models/$(@F:model-%=%)
$(DONE)/model-smollm2: private COMMAND = ln -sfn $(abspath $(SMOLLM2)) $(OUT)/models/smollm2
TORCHRUN = -m torch.distributed.run --standalone --nproc-per-node $(HYBRID_GPUS)
pretrain = $(1) tools/pretrain_tiny.py --data $(DATA) --work $(OUT)/tokens --out $(OUT)/pretrained --models $(2) \
  $(if $(INIT),--init $(2)=$(INIT)$(3)) --rate $(4) --phases $(PHASES_$(2)) --wall $(or $(WALL_$(2)),$(WALL)) --eval-seconds $(EVAL_SECONDS) --workers $(WORKERS) \
  --seed $(SEED) $(PRETRAIN) && ln -sfn ../pretrained/tiny-$(2) $(OUT)/models/$(3)

define selector_of
$(DONE)/selector-$(1)-$(2): $(DONE)/model-$(1)
$(DONE)/selector-$(1)-$(2): private COMMAND = $$(call distil,$(1),$(2),text,$$(LENGTH),4,$$(RATE_$(2)),$$(LONGEST))
endef
$(foreach model,$(TINY),$(foreach preset,spot paper,$(eval $(call selector_of,$(model),$(preset)))))
$(DONE)/selector-smollm2-spot: $(DONE)/model-smollm2 $(DONE)/text-smollm2
$(DONE)/selector-smollm2-spot: private COMMAND = $(call distil,smollm2,spot,text-smollm2,4096,8,2e-3,8192)
# Model, preset, text, length, sequences a step, rate, length of calibration.
distil = rm -rf $(OUT)/selectors/$(1)/$(2) && $(ON) -- $(SPOT_BUILD)/spot distill --model $(OUT)/models/$(1) --preset $(2) \
  --out $(OUT)/selectors/$(1)/$(2) --data $(OUT)/$(3)/train.jsonl --length $(4) $(MIX_$(1)) --sequences-per-step $(5) --steps $(STEPS_$(1)) \
  --warmup-steps $$(($(STEPS_$(1)) / 10)) --lr $(6) --calibration-length $(7) --dtype $(DTYPE) $(LOSS_$(2)) $(DISTILL)

# Prompts are answered by many processes, of whatever table, that share the GPUs.
table = $(PYTHON) tools/accuracy.py --model $(OUT)/models/$(1) --selector $(OUT)/selectors/$(1)/$(3) --out $(OUT)/tables/$(1)/$(2) \
  --text $(OUT)/text/heldout.txt --jobs $(JOBS) --launch "$(ON) --share $(SHARE) --" $(4) -- --threads 1 --dtype $(DTYPE)
RULER := --steps ruler --ruler-options "--mass-every 6 --prefill-chunk 4096"
TEXT := --steps text --twilight "p=0.95,k=25%" --text-options "--chunk 1024 --measured-queries 2"
QUANTISED := $(foreach format,int8 mxfp4 nvfp4,spot:k=10%,cache=$(format);spot:p=0.7,cache=$(format);)
SPARSE := $(foreach rule,k=1024 k=10% p=0.7,spot:$(rule),cache=int4,prefill=sparse,tile=16;)
TINY_RULER = $(RULER) --lengths $(LONGEST) --samples $(SAMPLES)
SPOT_TABLE = $(TINY_RULER) --tasks $(SIX) --rules $(RULES) --more "$(QUANTISED)"
PAPER_TABLE = $(TINY_RULER) --tasks $(SIX) --rules $(RULES) --no-baselines
OTHER_TABLE = $(TINY_RULER) --tasks $(OTHER) --rules k=1024,k=10%,p=0.7
SPARSE_TABLE = $(TINY_RULER) --tasks $(SIX) --rules "" --more "$(SPARSE)" --no-baselines
TEXT_TABLE = $(TEXT) --lengths $(LONGEST) --sequences $(SEQUENCES) --rules k=1024,k=4096,k=10%,p=0.7,p=0.8,p=0.9

define table_of
$(DONE)/table-$(1)-$(2): $(DONE)/selector-$(1)-$(3)
$(DONE)/table-$(1)-$(2): private COMMAND = $$(call table,$(1),$(2),$(3),$$($(4)))
endef
$(foreach model,$(TINY),\
  $(eval $(call table_of,$(model),spot,spot,SPOT_TABLE))\
  $(eval $(call table_of,$(model),paper,paper,PAPER_TABLE))\
  $(eval $(call table_of,$(model),other,spot,OTHER_TABLE))\
  $(eval $(call table_of,$(model),sparse,spot,SPARSE_TABLE))\
  $(eval $(call table_of,$(model),text,spot,TEXT_TABLE)))
$(eval $(call table_of,smollm2,needles,spot,SMOLLM2_NEEDLES))
$(eval $(call table_of,smollm2,text,spot,SMOLLM2_TEXT))
SMOLLM2_RULES := k=512,k=1024,k=2048,k=10%,k=25%,p=0.7,p=0.8,p=0.9
SMOLLM2_NEEDLES = $(RULER) --lengths 4096,8192 --samples 26 --tasks niah_single_1,niah_single_2,niah_multikey_1,niah_multivalue --rules $(SMOLLM2_RULES)
SMOLLM2_TEXT = $(TEXT) --lengths 2048,4096,8192 --sequences 4 --rules $(SMOLLM2_RULES)
