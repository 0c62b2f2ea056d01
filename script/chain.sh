# Learn a mask, extract it, apply it, measure perplexity, report: the chain that every learn_mask_*.sh sources.
#
# Each setting below can be given from the environment:  samples=100 output_dir=runs/try bash script/learn_mask_...sh
# --dry-run prints the plan and the commands, and runs nothing. Other arguments go to end-to-end/main.py.
# A second start resumes a stage that was broken off and skips those that are done.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

: "${model_dir:?set model_dir to a checkpoint folder or Hub id}"
: "${method:=paper}" "${dataset:=c4}" "${samples:=400}" "${ctx_len:=4096}" "${batch_size:=1}" "${seed:=42}"
: "${lambda_value:=}" "${learning_rate:=}" "${project_lambda2:=0}" "${lambda2_value:=0}" "${epsilon:=0.1}"
: "${accelerate_config:=}" # of accelerate launch, as script/accelerate/fsdp2.yaml
: "${dtype:=auto}" "${device:=auto}" "${split:=all}" "${max_windows:=}" "${zero_shot:=0}"
IFS=';' read -r -a texts <<<"${evaluation:=wikitext2;c4}" # separated by semicolons, so that paths may have spaces
if [[ -z ${output_dir:-} ]]; then
    name=${model_dir%/} text=${dataset%/}
    output_dir=runs/${name##*/}-${text##*/}_${method}_${samples}_lr${learning_rate:-default}_len${ctx_len}
    output_dir+=_batch${batch_size}_lambda${lambda_value:-default}
    [[ $project_lambda2 == 1 ]] && output_dir+=_lambdatwo${lambda2_value}_eps${epsilon}
fi

dry_run=0 extra=()
for argument in "$@"; do
    case $argument in
    --dry-run | --dry_run) dry_run=1 ;;
    *) extra+=("$argument") ;;
    esac
done

learn=(--model "$model_dir" --dataset "$dataset" --method "$method" --samples "$samples" --ctx_len "$ctx_len"
    --batch_size "$batch_size" --seed "$seed" --dtype "$dtype" --device "$device" --output_dir "$output_dir")
[[ -n $lambda_value ]] && learn+=(--lambda_value "$lambda_value")
[[ -n $learning_rate ]] && learn+=(--learning_rate "$learning_rate")
[[ $project_lambda2 == 1 ]] && learn+=(--project_lambda2 1 --lambda2_value "$lambda2_value" --epsilon "$epsilon")
learn+=(${extra[@]+"${extra[@]}"}) # an empty array is an unset variable to bash 3 (macOS)
measure=(--dataset "${texts[@]}" --split "$split" --ctx_len "${eval_ctx_len:-$ctx_len}" --dtype "$dtype" --device "$device")
[[ -n $max_windows ]] && measure+=(--max_windows "$max_windows")

# One process a GPU where there are several; CUDA_VISIBLE_DEVICES chooses.
launch=("$python")
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [[ $device != cpu ]] && ((gpus > 1)); then
    launch=("$python" -m accelerate.commands.launch --num_processes "$gpus")
    [[ -n $accelerate_config ]] && launch+=(--config_file "$accelerate_config")
fi

# stage TITLE DONE COMMAND...: run a command unless the file DONE is there already, made by the same command.
stage() {
    local title=$1 done=$2
    shift 2
    if ((dry_run)); then
        printf '\n# %s\n' "$title"
        printf '%q ' "$@"
        printf '\n'
        return
    fi
    local stamp="$output_dir/.${title//[^a-z]/_}.command" now
    now=$(printf '%q ' "$@")
    if [[ -e $done ]]; then
        if [[ -e $stamp && $(<"$stamp") != "$now" ]]; then
            printf 'error: %s was made by another command:\n  %s\nnow it is\n  %s\n' "$done" "$(<"$stamp")" "$now" >&2
            printf 'Give another output_dir, or delete that file.\n' >&2
            exit 2
        fi
        printf '\n== %s: done already (%s)\n' "$title" "$done"
        return
    fi
    printf '\n== %s\n' "$title"
    "$@"
    printf '%s' "$now" >"$stamp"
}

((dry_run)) && "$python" -m proxsparse plan "${learn[@]}"
stage "learn" "$output_dir/mask.safetensors" "${launch[@]}" "$root/end-to-end/main.py" "${learn[@]}"
stage "extract" "$output_dir/blocks.json" "$python" "$root/end-to-end/mask_op.py" --checkpoint "$output_dir" \
    --record "$output_dir/blocks.json"
stage "dense perplexity" "$output_dir/dense.json" "$python" "$root/eval/ppl.py" --model "$model_dir" "${measure[@]}" \
    --output "$output_dir/dense.json"
stage "apply, and perplexity under the mask" "$output_dir/pruned.json" "$python" "$root/eval/eval_mask_ppl.py" \
    --model "$model_dir" --mask "$output_dir" "${measure[@]}" --save "$output_dir/pruned" --output "$output_dir/pruned.json"
[[ $zero_shot == 1 ]] && stage "zero-shot tasks" "$output_dir/zero_shot.json" "$python" "$root/eval/zero_shot.py" \
    --model "$output_dir/pruned" --output "$output_dir/zero_shot.json"
stage "report" "" "$python" "$root/eval/report.py" --run "$output_dir" \
    --rows "dense=$output_dir/dense.json" "ProxSparse 2:4=$output_dir/pruned.json"
