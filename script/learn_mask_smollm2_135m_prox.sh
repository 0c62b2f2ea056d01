#!/usr/bin/env bash
# Learn a mask for SmolLM2-135M with the published method (arXiv 2502.00258), with lambda and rate relative to the weights.
# Model and texts come from script/setup.sh. script/chain.sh explains its settings and --dry-run.
recipe=smollm2-135m-prox
: "${evaluation:=wiki;news}" "${split:=heldout}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
