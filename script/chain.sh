# Learn a mask, extract it, measure, save the pruned checkpoint, report. Every learn_mask_*.sh sources this file.
#
# Each variable named below is a setting:  samples=100 output_dir=runs/try bash script/learn_mask_...sh
# --dry-run shows the plan and the commands, and runs nothing. Other arguments go to end-to-end/main.py.
# If it stops, start it again: each command skips what is done already.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
arguments "$@"
flags recipe model_dir method pattern permute dataset samples ctx_len batch_size seed lambda_value learning_rate \
    project_lambda2 lambda2_value epsilon dtype device output_dir
learn=("$root/end-to-end/main.py" ${flags[@]+"${flags[@]}"} ${given[@]+"${given[@]}"})
IFS=';' read -r -a texts <<<"${evaluation:-wikitext2;c4}" # semicolons separate them, so that paths may have spaces
flags split max_windows dtype device
for baseline in ${baselines:-}; do # a wrong name is told now, and not after learning
    "$python" "$root/baseline/main.py" --prune_method "$baseline" --help >/dev/null
done
run=(--run "$("$python" "${learn[@]}" --where)")
if ((dry_run)); then
    "$python" "${learn[@]}" --dry_run
else
    launcher
    stage "learn" "${launch[@]}" "${learn[@]}"
fi
measure=("${run[@]}" --dataset "${texts[@]}" ${eval_ctx_len:+--ctx_len "$eval_ctx_len"} ${flags[@]+"${flags[@]}"})

stage "extract" "$python" "$root/end-to-end/mask_op.py" "${run[@]}"
for baseline in ${baselines:-}; do
    stage "prune by $baseline" "$python" "$root/baseline/main.py" "${run[@]}" --prune_method "$baseline" --mask_only
    stage "measure $baseline" "$python" "$root/eval/eval_mask_ppl.py" "${measure[@]}" --baseline "$baseline"
done
stage "measure the dense model" "$python" "$root/eval/ppl.py" "${measure[@]}"
stage "apply the mask, and measure" "$python" "$root/eval/eval_mask_ppl.py" "${measure[@]}"
[[ ${zero_shot:-0} == 0 ]] || stage "measure zero-shot tasks" "$python" "$root/eval/zero_shot.py" "${run[@]}"
stage "report" "$python" "$root/eval/report.py" "${run[@]}"
