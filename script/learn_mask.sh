#!/usr/bin/env bash
# Learn a mask for any model, with this project's defaults:  bash script/learn_mask.sh MODEL [flags of end-to-end/main.py]
# script/chain.sh explains settings from the environment, --dry-run, and how to go on after a stop.
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "error: give a model first: bash script/learn_mask.sh MODEL [--dry-run] [flags of end-to-end/main.py]" >&2
    exit 2
fi
model_dir=$1
shift
: "${method:=masked}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
