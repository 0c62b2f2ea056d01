#!/usr/bin/env bash
# Learn a mask with RoI, from SparseGPT's mask. script/baseline.sh says how to call it.
prune_method=roi
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
