# Every command of the project; `make` alone lists them. Python 3.11 or newer and git are all it needs.
# PYTHON=... chooses the interpreter; UV_DEFAULT_INDEX, UV_CACHE_DIR and the like are uv's own.

UV := 0.13.9
ROOM_GB := 8
PORT ?= 5000
PROCESSES ?= 3
N ?= 3
export PRESET FORCE PYTHON SET GPUS NAME N

# Only .venv counts, whatever is active in the user's shell, and nothing here reports home.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
# Without compiled modules, each stage compiles the thousands that LLaMA-Factory imports: 25 s more.
unexport PYTHONDONTWRITEBYTECODE
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

# A file's tests share what is dear to make, so they stay in one process; the longest file comes first
# (tests/conftest.py). Three processes, because servers and DVC are waited for.
TESTS = $(IN_VENV) python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

IN_VENV := PATH="$$PWD/.venv/bin:$$PATH"
DIE := die() { echo "$$*" >&2; exit 1; };

.DEFAULT_GOAL := help
.PHONY: help repro test check check-data lint setup use ui exps sweep seeds costs sync ask export serve chat release \
  publish plan doctor verify check-certificate extras lock clean venv
.SILENT:

help: ## List these commands
	awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

repro: setup ## Run the pipeline: every stage whose inputs changed
	$(IN_VENV) dvc repro

test: lint ## Lint, check types, run all tests (three processes)
	$(TESTS)

check: lint ## Lint, check types, run the fast tests (90 seconds)
	$(TESTS) -m "not slow"

check-data: setup ## Show what the first rows of data.source hold, and what would be left out
	$(IN_VENV) python -m stages check

lint: setup ## Lint and check types only
	$(IN_VENV) ruff check .
	$(IN_VENV) mypy

# The copy of the lock file inside .venv says what is installed. It is compared by content, because
# a checkout changes times, and it is written last, so that an interrupted installation starts again.
setup: venv ## Create .venv with the locked requirements (the commands above do it when needed)
	$(DIE) cmp -s requirements.txt .venv/installed.txt || { \
	rm -f .venv/installed.txt; \
	.venv/bin/uv pip sync --python .venv/bin/python --require-hashes requirements.txt && \
	cp requirements.txt .venv/installed.txt || die "Installing failed for the reason above." \
	"Run the same command again to go on; UV_CACHE_DIR=... moves uv's downloads to another disk."; }

extras: setup ## Install what single commands and formats need too: signing, HEIC, Google Drive, ...
	.venv/bin/uv pip install --python .venv/bin/python --require-hashes --requirement requirements-extras.txt

use: ## Switch to a preset: make use PRESET=name
	$(DIE) names= there= known=; for file in params/*.yaml; do \
	  name=$${file#params/}; name=$${name%.yaml}; names="$$names $$name"; \
	  [ "$$name" != "$$PRESET" ] || there=yes; \
	  ! cmp -s "$$file" params.yaml || known=yes; done; \
	[ -n "$$there" ] || die "Which preset? make use PRESET=name, with one of:$$names"; \
	[ -n "$$known$$FORCE" ] || [ ! -e params.yaml ] || \
	  [ -z "$$(git status --porcelain -- params.yaml 2>&1)" ] || \
	  die "params.yaml has edits that are neither committed nor a preset; FORCE=1 discards them."; \
	cp "params/$$PRESET.yaml" params.yaml && echo "params.yaml is now params/$$PRESET.yaml."

# The server's job queues, seven more processes, serve functions that this project does not use.
ui: setup ## Show the tracked runs in MLflow, on this machine only (PORT=5000)
	$(IN_VENV) python -m stages view --port $(PORT)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(IN_VENV) mlflow server --workers 1 \
	  --host 127.0.0.1 --port $(PORT) \
	  --backend-store-uri sqlite:///mlflow.db --artifacts-destination mlartifacts

# To pip 23.2, which Python 3.11 brings, a[x]==1, a[x, y]==1 and a==1 are three packages, each refused
# if the lock has not got it; so an entry with extras is repeated without them and with each of them.
# Without --drop the table has a column for every file that a stage reads or writes.
exps: setup ## Compare experiments: changed parameters, headline figures (ARGS=-A: of all commits)
	[ -t 1 ] || export COLUMNS=$${COLUMNS:-250}; $(IN_VENV) dvc exp show --no-pager --only-changed --drop 'Created|.*/.*' $(ARGS)

sweep: setup ## Run every combination: make sweep SET='train.beta=0.05,0.1' (GPUS=0,1: one each)
	$(IN_VENV) python -m stages sweep --sets "$$SET" --gpus "$$GPUS" --name "$$NAME"

seeds: setup ## Train with N other seeds (N=3, GPUS=0,1, SET= what else differs, NAME=)
	$(IN_VENV) python -m stages sweep --sets "$$SET train.seed=$$(seq -s , 1 "$$N")" \
	  --gpus "$$GPUS" --name "$$NAME"

costs: setup ## What each stage took when it ran here
	$(IN_VENV) python -m stages costs

verify: setup ## Run the committed pipeline again in a clone and compare (STAGES="format train", KEY=key.pem)
	$(IN_VENV) python -m stages verify $(if $(STAGES),--stages "$(STAGES)") $(if $(KEY),--key $(KEY))

check-certificate: setup ## Is all here what reports/certificate.json says (PUBLIC_KEY=key.pub)
	$(IN_VENV) python -m stages certificate $(if $(PUBLIC_KEY),--public-key $(PUBLIC_KEY))

doctor: setup ## Look for upstream's silent faults in the installed packages (under a minute)
	$(IN_VENV) python -m stages doctor

plan: setup ## What the run will take, what is missing (UTILISATION=0.3, PAIRS=1000)
	$(IN_VENV) python -m stages plan $(if $(PAIRS),--pairs $(PAIRS)) \
	  $(if $(UTILISATION),--utilisation $(UTILISATION))

sync: setup ## Log to MLflow what it could not be given before
	$(IN_VENV) python -m stages sync

ask: setup ## Ask base and tuned: make ask IMAGE=photo.jpg QUESTION="..." (or PAIRS=5, test pairs)
	$(IN_VENV) python -m stages ask $${IMAGE:+--image "$$IMAGE"} $${QUESTION:+--question "$$QUESTION"} \
	  $${PAIRS:+--pairs "$$PAIRS"}

export: setup ## Merge the adapter into its base: models/merged
	$(IN_VENV) python -m stages export

# Some shells set HOST to the machine's name, which nobody asked to listen on.
LISTEN = $(if $(filter command,$(origin HOST)),--host "$(HOST)") \
  --port $(if $(filter file,$(origin PORT)),$(1),$(PORT))

serve: setup ## OpenAI's API for tuned and base, on this machine only (PORT=8000, MODELS=tuned)
	$(IN_VENV) python -m stages serve $${MODELS:+--models "$$MODELS"} $(call LISTEN,8000)

chat: setup ## A page to chat with the tuned model, on this machine only (PORT=7860)
	$(IN_VENV) python -m stages serve --models chat $(call LISTEN,7860)

release: setup ## Tag the adapter here as a version: make release VERSION=v1.0.0 (FORCE=1)
	$(IN_VENV) python -m stages release --version "$$VERSION" $${FORCE:+--force "$$FORCE"}

publish: setup ## Upload a release to the Hub, private: make publish REPO=owner/name (VERSION=, PUBLIC=1)
	$(IN_VENV) python -m stages publish --repo "$$REPO" $${VERSION:+--version "$$VERSION"} \
	  $${PUBLIC:+--public "$$PUBLIC"}

lock: venv ## Resolve requirements*.in into requirements*.txt (ARGS=--upgrade for the newest)
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-strip-extras --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock" $(ARGS) requirements.in --output-file requirements.txt
	.venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --no-strip-extras --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock" $(ARGS) requirements-extras.in --output-file requirements-extras.txt
	.venv/bin/python -c 'import pathlib, re; file = pathlib.Path("requirements.txt"); \
	  forms = lambda m: [m[1] + m[3], *(f"{m[1]}[{x}]{m[3]}" for x in m[2].split(", ")), m[0]]; \
	  entry = r"(?m)^(\S+?)\[(.+?)\](==.*\\\n(?: +--hash.*\n)+)"; \
	  text = re.sub(entry, lambda m: "".join(dict.fromkeys(forms(m))), file.read_text()); \
	  file.write_text(text)'

clean: ## Delete .venv and the tools' caches; data, models and results stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A .venv made here, whose Python still runs, with the pinned uv; made anew if anything of that fails.
venv:
	$(DIE) found= python=; here=$$(pwd -P); \
	[ ! -L .venv ] || die ".venv is a link, and what it leads to may be another project's: delete the link."; \
	[ "$$(cat .venv/made-in.txt 2>/dev/null)" = "$$here uv $(UV)" ] && \
	  .venv/bin/python -c '' 2>/dev/null && exit 0; \
	command -v git >/dev/null || die "git was not found, and DVC needs it: install git."; \
	[ -e .git ] || die "This folder is not a Git clone, which DVC needs: use git clone, or git init."; \
	set -- python3.11 python3.12 python3.13 python3; [ -z "$$PYTHON" ] || set -- "$$PYTHON"; \
	for name; do version=$$("$$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
	    2>/dev/null) || continue; \
	  found="$$found, but $$name is $$version"; \
	  python=$$("$$name" -c 'import sys; assert sys.version_info >= (3, 11); print(sys._base_executable)' \
	    2>/dev/null) && break; done; \
	[ -n "$$python" ] || die "Python 3.11 or newer is needed$${found:-, but there is no working $$*}:" \
	  "install it, or name it with PYTHON=/path/to/python."; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || die "$$python lacks the venv module;" \
	  "on Debian and Ubuntu: apt install python$$version-venv."; \
	at=.; [ ! -d .venv ] || at=.venv/; old=$$(du -sk .venv/ 2>/dev/null | cut -f 1); \
	free=$$(df -Pk $$at 2>/dev/null | awk 'NR == 2 { print $$4 }'); \
	free=$$(( ($${free:-999999999} + $${old:-0}) / 1048576 )); \
	[ $$free -ge $(ROOM_GB) ] || die "The disk of this folder has $$free GB free;" \
	  "the installation needs $(ROOM_GB) GB."; \
	"$$python" -m venv --clear .venv && \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV) && \
	echo "$$here uv $(UV)" > .venv/made-in.txt || die "Making .venv failed for the reason above."
