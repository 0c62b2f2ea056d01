#!/usr/bin/env bash
# Learn a mask for Mistral-7B-v0.3 with the paper's settings (arXiv 2502.00258).
# script/chain.sh explains its settings, --dry-run, and how to go on after a stop.
recipe=mistral-v0.3-7b-prox
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
