#!/usr/bin/env bash
# Prune to 2:4 with ADMM. script/baseline.sh says how to call it. ADMM changes weights: give --save_model FOLDER.
# To keep the original weights, give --mask_only --save FOLDER.
prune_method=admm
source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
