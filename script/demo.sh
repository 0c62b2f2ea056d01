#!/usr/bin/env bash
# Learn a 2:4 mask for SmolLM2-135M on this machine's CPU (or GPU), and show how good it is.
#
#   bash script/demo.sh            under 20 minutes on 2 cores, installation included
#   bash script/demo.sh --quick    about 5 minutes, with a weaker mask
#
# Everything is written to runs/demo (runs/demo-quick). Interrupt it whenever you like: the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

samples=100 ctx_len=512 windows=16 run=runs/demo
if [[ ${1:-} == --quick ]]; then
    samples=20 ctx_len=256 windows=6 run=runs/demo-quick
elif [[ $# -gt 0 ]]; then
    echo "error: demo.sh takes --quick or nothing; got $1" >&2
    exit 2
fi

bash script/setup.sh
source .venv/bin/activate
export HF_HUB_OFFLINE=1

model=smollm2-135m text=wiki
evaluation=(--model "$model" --dataset "$text" news --split heldout --ctx_len "$ctx_len" --max_windows "$windows" --dtype float32)
say() { printf '\n== %s\n' "$*"; }

say "learning a mask from $samples samples of $ctx_len tokens"
if [[ ! -f $run/mask.safetensors ]]; then
    python end-to-end/main.py --model "$model" --dataset "$text" --ctx_len "$ctx_len" --samples "$samples" \
        --output_dir "$run" --save_steps 0.2 --save_total_limit 2
fi
say "extracting the mask from the learned weights"
python end-to-end/mask_op.py --checkpoint "$run" --record "$run/blocks.json"
say "one-shot baselines on the same samples"
for method in magnitude wanda; do
    [[ -f $run/$method/mask.safetensors ]] || python baseline/main.py --model "$model" --prune_method "$method" \
        --dataset "$text" --ctx_len "$ctx_len" --nsamples "$samples" --seed 42 --save "$run/$method"
done
say "perplexity on held-out text"
[[ -f $run/dense.json ]] || python eval/ppl.py "${evaluation[@]}" --output "$run/dense.json"
for method in magnitude wanda; do
    [[ -f $run/$method.json ]] ||
        python eval/eval_mask_ppl.py "${evaluation[@]}" --mask "$run/$method" --output "$run/$method.json"
done
[[ -f $run/proxsparse.json ]] || python eval/eval_mask_ppl.py "${evaluation[@]}" --mask "$run" \
    --save "$run/pruned" --output "$run/proxsparse.json"
say "result"
python eval/report.py --run "$run" --rows "dense=$run/dense.json" "magnitude 2:4=$run/magnitude.json" \
    "Wanda 2:4=$run/wanda.json" "ProxSparse 2:4=$run/proxsparse.json" \
    --compare "magnitude=$run/magnitude" "Wanda=$run/wanda"
echo "pruned checkpoint: $run/pruned"
