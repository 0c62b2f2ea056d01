#!/usr/bin/env bash
# SparseGPT, 2:4; use: see script/baseline.sh. It updates weights: give --save_model FOLDER, or, to keep them,
# --mask_only --save FOLDER.
prune_method=sparsegpt
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
