#!/usr/bin/env bash
# MaskLLM, learned from SparseGPT's mask. Use: see script/baseline.sh.
prune_method=maskllm
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
