# make demo   the flash crowd (or SCENARIO=FILE) on real VMs, with the live page and the report
# make test   everything, the tests with real VMs too
# make check  format, lints and the tests that need no machine: under half a minute when warm

SHELL := /bin/bash
CACHE := $(or $(VMATRIX_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vmatrix)
STORE := $(CACHE)/store
TARGET := $(or $(CARGO_TARGET_DIR),target)
VMATRIX := $(TARGET)/debug/vmatrix
RECIPES := $(wildcard scenarios/guests/*.toml)

.PHONY: demo test check setup build images replay ui clean

setup:
	@scripts/setup

build: setup
	cargo build --workspace --all-targets --locked

# Built once: an image is kept until its recipe, its files or the guest program change.
images: build
	@for recipe in $(RECIPES); do $(VMATRIX) image build $$recipe --store $(STORE) || exit; done

demo: images
	$(VMATRIX) demo $(if $(SCENARIO),--scenario $(SCENARIO)) --store $(STORE) --html $(TARGET)/demo.html

test: images
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	VMATRIX_STORE=$(STORE) cargo nextest run --workspace --locked

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo nextest run --workspace --locked -E 'not test(/machine_/)'

replay: build
	$(VMATRIX) replay scenarios/library/flash-crowd.toml

ui:
	cd dashboards/ui && npm ci --ignore-scripts && npm run build

clean:
	rm -rf $(TARGET) $(STORE)
