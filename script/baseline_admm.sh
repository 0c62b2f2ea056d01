#!/usr/bin/env bash
# ADMM, weights updated (--mask_only --save FOLDER keeps them), 2:4:  bash script/baseline_admm.sh MODEL --save_model FOLDER [flags of baseline/main.py]
set -euo pipefail
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "error: give a model first: bash script/baseline_admm.sh MODEL --save_model FOLDER [flags of baseline/main.py]" >&2
    exit 2
fi
model=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -z ${python:-} && -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
exec "${python:-python}" "$root/baseline/main.py" --model "$model" --prune_method admm "$@"
