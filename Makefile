# Every target works from a fresh clone: each installs what it needs first, which is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export CRAM_BENCH_RUNS ?= $(CURDIR)/runs
# Idle OpenMP threads sleep instead of spinning: two processes on two cores would otherwise fight.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install report cifar10 digits sst2 benchmark lab test check counts readme docs dist clean

help:
	@echo "make report    train SGD, SAM and CrAM on the digits and write reports/digits-convnet-quick/index.html"
	@echo "make lab       open JupyterLab on copies of the notebooks, in lab/ (FLAGS='--no-browser' … for Jupyter)"
	@echo "make test      lint, type check and test"
	@echo "make cifar10   the committed CIFAR-10 reports (some hours on two cores, where nothing is trained)"
	@echo "make digits    the committed reports on the digits (half an hour on two cores)"
	@echo "make sst2      the committed report on language (half an hour on two cores)"
	@echo "make benchmark ratios against peers, in turns, for an idle machine (the better part of an hour)"
	@echo "make readme    copy the committed reports' tables into README.md and docs/"
	@echo "make counts    count what the run store survives, and copy that into docs/"
	@echo "make docs      build the documentation into site/index.html, and check its links (to search: python -m http.server -d site)"
	@echo "make dist      build a wheel and a source distribution into dist/"
	@echo "make install   create $(VENV) and install everything into it"
	@echo "make clean     remove $(VENV) and caches; runs/ and reports/ stay"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV): some minutes the first time, for torch is large …"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[report,lab,language,sweep,deploy,tensorboard,docs,dev]'
	touch $@

report: install
	$(BIN)/cram-bench report --dataset digits

SPECIALISTS = -p pruners '[global, "exactobs(samples:128,scope:global)", "greedy(gradients:128,batch:1)"]' -p sparsities '[0.8,0.9]'

cifar10: install
	$(BIN)/cram-bench report --dataset cifar10 --profile full --keep-runs -p curvature_sample 100 \
	  -p methods '[sgd, sam, cram+-multi, cram+-ramp]'
	$(BIN)/cram-bench report --dataset cifar10 --profile full --seeds 3 --keep-runs -p epochs 15 -p sample 500 -p curvature_sample 100 \
	  -p methods '[sgd, sam, cram-single, cram+-multi]' -p patterns '[global, "2:4", "4:8"]' --name cifar10-resnet20-15-epochs
	$(BIN)/cram-bench report --dataset cifar10 --notebook equal_cost --profile full --seeds 3 -p epochs 15 -p shorter true \
	  -p methods '[sgd, cram-single, cram+-multi]' --name cifar10-equal-cost
	$(BIN)/cram-bench report --dataset cifar10 --notebook ablations --profile full -p epochs 8 --name cifar10-ablations
	$(BIN)/cram-bench report --dataset cifar10 --notebook transfer --profile full -p epochs 10 --name cifar10-transfer
	$(BIN)/cram-bench report --dataset cifar10 --notebook second_order --profile full --seeds 1 --keep-runs -p epochs 15 \
	  -p held_out 2000 -p sparsities '[0.8, 0.9]' -p pruners '[global, obd, "obs(update:none)", obert, obs, "global+obs", mfac, cap, \
	  "greedy(update:none)", greedy, "exactobs(scope:global)", sparsegpt, "2:4", "2:4+obs", obertx16]' --name cifar10-second-order
	$(BIN)/cram-bench report --dataset cifar10 --notebook better_pruner --profile full --seeds 3 --keep-runs --threads 1 -p epochs 15 \
	  -p held_out 2000 -p sparsities '[0.8, 0.9, 0.95]' -p corrections '[none, batchnorm]' \
	  -p methods '[sgd, sam, cram-single, cram+-multi]' -p pruners '[global, greedy, "exactobs(scope:global)"]' --name cifar10-better-pruner
	$(BIN)/cram-bench report --dataset cifar10 --notebook better_pruner --profile full --seeds 1 --keep-runs -p epochs 15 \
	  -p held_out 2000 -p sparsities '[0.8, 0.9, 0.95]' -p corrections '[none, batchnorm]' \
	  -p methods '[sgd, cram+-multi, cram+-looking]' -p pruners '[global, greedy, "exactobs(scope=global)"]' --name cifar10-looking
	$(BIN)/cram-bench report --dataset cifar10 --notebook better_pruner --profile full --seeds 1 -p epochs 15 \
	  -p held_out 2000 -p sparsities '[0.95]' -p methods '[sgd, cram-single, cram+-multi]' -p pruners '[global, "global+obs", \
	  "global+obs(damping:1)", "global+obs(at:global@0.95)", "global+exactobs", "greedy(update:none)", greedy, \
	  "greedy(damping:1)", "greedy(at:global@0.95)", greedyx4g]' --name cifar10-pruners-at-95
	$(BIN)/cram-bench report --dataset cifar10 --notebook specialist --profile full --seeds 1 -p epochs 15 \
	  -p task '[airplane,automobile,ship,truck]' $(SPECIALISTS) --name cifar10-specialist-vehicles
	$(BIN)/cram-bench report --dataset cifar10 --notebook specialist --profile full --seeds 1 -p epochs 15 \
	  -p task '[cat,dog]' $(SPECIALISTS) --name cifar10-specialist-cat-dog
	$(MAKE) readme

digits: install
	$(BIN)/cram-bench report --dataset digits --notebook gradual --profile full --seeds 3 --threads 1 -p epochs 20 \
	  -p methods '[sgd, cram+-multi, cram-single, "gmp*", obert, safe]' --name digits-gradual
	$(BIN)/cram-bench report --dataset digits --notebook preconditioners --profile full --seeds 3 --threads 1 -p ggt_lr 0.1 \
	  -p repeated '[sgd, adamw, m-fac, s-m-fac, lowrank-m-fac, ggt, s-ggt]' --name digits-preconditioners
	$(MAKE) readme

sst2: install
	$(BIN)/cram-bench report --notebook language --name sst2-minilm --profile full
	$(BIN)/cram-bench report --dataset sst2 --notebook second_order --profile full --seeds 1 -p methods '[adamw]' -p held_out 2000 \
	  -p sparsities '[0.5, 0.7, 0.8]' -p corrections '[none]' -p pruners '[global, "obert(gradients:256,block:50)", \
	  "greedy(gradients:256,block:64)"]' --name sst2-second-order
	$(MAKE) readme

lab: install
	$(BIN)/python scripts/lab.py $(FLAGS)

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

benchmark: install
	$(BIN)/python -m benchmarks
	$(MAKE) readme

check: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

counts: install
	rm -f reports/.robustness.json
	CRAM_BENCH_COUNTS=$(CURDIR)/reports/.robustness.json CRAM_BENCH_TEST_ROUNDS=200 $(BIN)/python -m pytest \
	  tests/test_crash.py tests/test_sweep.py tests/test_bad_input_cli.py tests/test_store.py tests/test_streaming.py \
	  tests/test_others_files.py tests/test_others_reports.py tests/test_pages.py tests/test_executing.py \
	  tests/test_runs.py::test_any_damaged_checkpoint_is_noticed
	mv reports/.robustness.json reports/robustness.json
	$(MAKE) readme

readme: install
	$(BIN)/python scripts/fill.py

docs: install
	$(BIN)/mkdocs build --strict

dist: install
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
