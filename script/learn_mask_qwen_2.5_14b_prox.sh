#!/usr/bin/env bash
# Learn a mask for Qwen2.5-14B with the paper's settings (arXiv 2502.00258).
# script/chain.sh explains its settings, --dry-run, and how to go on after a stop.
recipe=qwen2.5-14b-prox
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
