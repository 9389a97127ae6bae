# Every command of the project; `make` alone lists them. Python 3.11 or newer and git are all it needs.
# PYTHON=... chooses the interpreter; UV_DEFAULT_INDEX, UV_CACHE_DIR and the like are uv's own.

UV := 0.13.9
ROOM_GB := 8
PORT ?= 5000
PROCESSES ?= 3
export PRESET FORCE PYTHON SET GPUS NAME QUESTION IMAGE

# Free text reaches a command as it was typed; make would take the $5 of a question for a variable.
$(foreach each,QUESTION IMAGE SET NAME,$(eval override $(each) := $$(value $(each))))

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
.PHONY: help repro back test check check-data lint setup use ui exps sweep costs log ask export serve release \
  publish plan doctor verify extras lock clean venv
.SILENT:

help: ## List these commands
	awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

repro: setup ## Run the pipeline: every stage whose inputs changed
	$(IN_VENV) dvc repro
	$(IN_VENV) python -m stages back --look 1

back: setup ## Go back to the last commit; edits that are not committed are lost
	$(IN_VENV) python -m stages back

test: lint ## Lint, check types, run the tests; CI=1 adds rehearsals of rare set-ups
	$(TESTS)

check: lint ## Lint, check types, run the fast tests (under a minute)
	$(TESTS) -m "not slow"

check-data: setup ## Show what the first rows of data.sources hold, and what would be left out
	$(IN_VENV) python -m stages check

lint: setup ## Lint and check types only
	$(IN_VENV) ruff check .
	$(IN_VENV) mypy

# The copy of the lock file inside .venv says what is installed. It is compared by content, because
# a checkout changes times, and it is written last, so that an interrupted installation starts again.
setup: venv ## Create .venv with the locked requirements (the commands above do it when needed)
	$(DIE) cmp -s requirements.txt .venv/installed.txt || { rm -f .venv/installed.txt; \
	.venv/bin/uv pip sync --python .venv/bin/python --require-hashes requirements.txt && \
	cp requirements.txt .venv/installed.txt || die "Installing failed for the reason above." \
	"Run the same command again to continue; UV_CACHE_DIR=... moves uv's downloads to another disk."; }

extras: setup ## Install optional packages too: Ray, SSH, ...
	.venv/bin/uv pip install --python .venv/bin/python --require-hashes --requirement requirements-extras.txt

use: setup ## Switch to a preset: make use PRESET=name
	$(IN_VENV) python -m stages use $${PRESET:+--preset "$$PRESET"} $${FORCE:+--force "$$FORCE"}

# The server's job queues, seven more processes, serve functions that this project does not use.
ui: setup ## Show the tracked runs in MLflow, on this machine only (PORT=5000)
	$(IN_VENV) python -m stages log --ui-port $(PORT)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(IN_VENV) mlflow server --workers 1 \
	  --host 127.0.0.1 --port $(PORT) \
	  --backend-store-uri sqlite:///mlflow.db --artifacts-destination mlartifacts

# Without --drop the table has a column for every file that a stage reads or writes; without --keep it
# loses the figures that two experiments share. DVC's own -A lists all commits; these have experiments.
FIGURES := val_win_rate|val_acc|win_rate|tuned_acc|correct|chosen_logps|margin
COMMITS = git for-each-ref --sort=-creatordate --format='%(refname)' refs/exps \
  | sed -nE 's|refs/exps/(..)/(.{38})/.*|\1\2|p' | awk '!seen[$$0]++'

exps: setup ## Compare experiments: headline figures, changed parameters (ARGS=-A: of all commits)
	[ -t 1 ] || export COLUMNS=$${COLUMNS:-250}; set -- $(filter-out -A,$(ARGS)); \
	for commit in $(if $(filter -A,$(ARGS)),HEAD $$($(COMMITS))); do set -- "$$@" --rev "$$commit"; done; \
	$(IN_VENV) dvc exp show --no-pager --only-changed --keep '(Experiment|$(FIGURES))$$' \
	  --drop 'Created|.*/.*' "$$@"

sweep: setup ## Run every combination, one on each GPU: make sweep SET='train.beta=0.05,0.1' GPUS=0,1
	$(IN_VENV) python -m stages sweep --sets="$$SET" --gpus="$$GPUS" --name="$$NAME"

costs: setup ## Show what each stage took when it ran here
	$(IN_VENV) dvc metrics show reports/diary/*.json

verify: setup ## Run the committed pipeline again in a clone and compare (STAGES="format train")
	$(IN_VENV) python -m stages verify $(if $(STAGES),--stages "$(STAGES)")

doctor: setup ## Look for upstream's silent faults in the installed packages (under a minute)
	$(IN_VENV) python -m pytest -vv -m doctor tests/test_doctor.py

plan: setup ## Estimate what the run takes, and say what this machine lacks for it
	$(IN_VENV) python -m stages plan

log: setup ## Log the results here to MLflow, after its server was away (NAME=experiment)
	$(IN_VENV) python -m stages log $${NAME:+--name "$$NAME"}

ask: setup ## Ask base and tuned: make ask IMAGE=photo.jpg QUESTION="..."
	$(IN_VENV) python -m stages ask $${IMAGE:+--image="$$IMAGE"} $${QUESTION:+--question="$$QUESTION"}

export: setup ## Merge the adapter into its base: models/merged
	$(IN_VENV) python -m stages export

# Some shells set HOST to the machine's name, which nobody asked to listen on.
serve: setup ## Serve tuned and base through OpenAI's API, on this machine only (PORT=8000)
	$(IN_VENV) python -m stages serve $(if $(filter command,$(origin HOST)),--host "$(HOST)") \
	  --port $(if $(filter file,$(origin PORT)),8000,$(PORT))

release: setup ## Tag the adapter here as a version: make release VERSION=v1.0.0
	$(IN_VENV) python -m stages release --version "$$VERSION"

publish: setup ## Upload a release to the Hub: make publish VERSION=v1.0.0 REPO=owner/name (PUBLIC=1)
	: "$${REPO:?write REPO=owner/name}"; $(IN_VENV) python -m stages release --version "$$VERSION" \
	  --repo "$$REPO" $${PUBLIC:+--public "$$PUBLIC"} $${I_ACCEPT:+--accept "$$I_ACCEPT"}

lock: venv ## Resolve requirements*.in into requirements*.txt (ARGS=--upgrade for the newest)
	for name in requirements requirements-extras; do .venv/bin/uv pip compile --quiet --universal \
	  --python-version 3.11 --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links \
	  --custom-compile-command "make lock" $(ARGS) $$name.in --output-file $$name.txt || exit; done

clean: ## Delete .venv and the tools' caches; data, models and results stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis

# A .venv made here, whose Python still runs, with the pinned uv; made anew if anything of that fails.
venv:
	$(DIE) made="$$(pwd -P) uv $(UV)"; \
	[ ! -L .venv ] || die ".venv is a link, perhaps to another project's environment: delete the link."; \
	[ "$$(cat .venv/made-in.txt 2>/dev/null)" = "$$made" ] && .venv/bin/python -c '' 2>/dev/null && exit; \
	[ -e .git ] && git --version >/dev/null 2>&1 || die "DVC needs Git: install git, and make this folder a" \
	  "clone of the project (git clone), or a repository of its own (git init)."; \
	set -- python3.11 python3.12 python3.13 python3; [ -z "$$PYTHON" ] || set -- "$$PYTHON"; \
	find='import sys, ensurepip, venv; assert sys.version_info >= (3, 11); print(sys._base_executable)'; \
	for name; do python=$$("$$name" -c "$$find" 2>/dev/null) && break; done; \
	[ -n "$$python" ] || die "None of these is a Python 3.11 or newer with its venv module: $$*. Install one" \
	  "(on Debian and Ubuntu, apt install python3-venv too), or name it with PYTHON=/path/to/python."; \
	rm -rf .venv; free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); \
	[ "$$free" -ge $(ROOM_GB) ] || die "The disk of this folder has $$free GB free, and the installation needs" \
	  "$(ROOM_GB) GB: free some, or clone the project to another disk."; \
	"$$python" -m venv .venv && .venv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV) && \
	echo "$$made" > .venv/made-in.txt || die "Making .venv failed for the reason above."
