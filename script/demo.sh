#!/usr/bin/env bash
# Learn a 2:4 mask for SmolLM2-135M on this machine's CPU (or GPU), and show how good it is.
#
#   bash script/demo.sh            13 to 20 minutes on 2 cores with bfloat16, 40 or more without; installed too
#   bash script/demo.sh --quick    about 5 minutes, with a weaker mask
#
# Everything is written to runs/demo (with --quick: runs/demo-quick). If it stops, start it again: it goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

samples=100 ctx_len=512 max_windows=16 output_dir=runs/demo
if [[ ${1:-} == --quick ]]; then
    samples=20 ctx_len=256 max_windows=6 output_dir=runs/demo-quick
elif [[ $# -gt 0 ]]; then
    echo "error: demo.sh takes --quick or nothing; got $1" >&2
    exit 2
fi

bash script/setup.sh
export HF_HUB_OFFLINE=1
model_dir=smollm2-135m dataset=wiki evaluation="wiki;news" split=heldout baselines="magnitude wanda"
dtype=float32 permute=auto
set -- --save_steps 0.2 --save_total_limit 2
source script/chain.sh
