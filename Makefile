# Every target sets itself up: it makes .venv once, and again when pyproject.toml or
# constraints.txt change. `make demo` installs what runs, the others also what develops.

VENV   := .venv
BIN    := $(VENV)/bin
PYTEST ?=                       # more arguments for pytest: make test PYTEST="-k turns -n 0"
BENCH  ?= encoder               # modules of benchmarks/

# package:what shows that it is there:what is off without it
SYSTEM := \
	"libportaudio2:libportaudio.so.2:the microphone (livesat listen, livesat devices) and its tests" \
	"pulseaudio:pulseaudio:the fake-microphone tests" \
	"pulseaudio-utils:pactl:the fake-microphone tests" \
	"libasound2-plugins:/usr/share/doc/libasound2-plugins:the fake-microphone tests" \
	"mosquitto:mosquitto:the MQTT tests against a real broker" \
	"redis-server:redis-server:the Redis Streams tests against a real server" \
	"ffmpeg:ffmpeg:the tests that send RTP, HTTP and MPEG-TS" \
	"openssl:openssl:the tests of TLS with certificates that are not good" \
	"util-linux:unshare:the test of a full disk" \
	"chromium:chromium:the dashboard's tests"

.PHONY: help setup absent demo test soak check bench scores pictures train-smoke build schema clean

help:
	@echo "make demo    watch the demo conversation live in this terminal, then its score"
	@echo "make test    all tests            make check   lint, types, imports, schema"
	@echo "make bench   measure              make build   wheel and sdist in dist/"
	@echo "make train-smoke   every stage of the recipes on a made-up corpus"
	@echo "make scores  score the embedded checkpoint, write the tables"
	@echo "make setup   .venv with everything a developer needs"

$(BIN)/python:
	@.ci/python $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing livesat and its dependencies into $(VENV) …"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[all]" -c constraints.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing livesat and the developer tools into $(VENV) …"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@ $(VENV)/.runtime

setup: $(VENV)/.dev
	@.ci/system $(SYSTEM)

# What of it is not there, a name a line; installs nothing.
absent:
	@.ci/system --absent $(SYSTEM)

demo: $(VENV)/.runtime
	@$(BIN)/livesat demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST)

# Ten minutes of eight live streams; lateness is judged without --untimed, on a machine of its own.
soak: setup
	$(BIN)/python -m benchmarks.soak --untimed

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m sinks.schema --check

schema: $(VENV)/.dev
	$(BIN)/python -m sinks.schema

bench: $(VENV)/.dev
	@set -e; for name in $(BENCH); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

# The tables in README.md and the model card, from the embedded checkpoint and the development data.
scores: $(VENV)/.dev
	$(BIN)/python -m recipes.score --set checkpoint=model/weights --set report=docs/scores.json
	$(BIN)/python -m recipes.publish

# The dashboard's pictures in docs/pictures, by a headless Chromium that hears the demo conversation.
pictures: setup
	$(BIN)/python -m tests.e2e.browser

train-smoke: $(VENV)/.dev
	$(BIN)/python -m recipes.smoke

build: $(VENV)/.dev
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist
