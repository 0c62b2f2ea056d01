#!/usr/bin/env bash
# Learn a 2:4 mask with MaskLLM, from SparseGPT's mask. script/baseline.sh says how to call it.
prune_method=maskllm
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
