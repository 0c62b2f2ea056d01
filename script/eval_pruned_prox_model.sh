#!/usr/bin/env bash
# Measure the authors' pruned models on wikitext2 and C4, each at the context length that it was learned with.
#
#   bash script/eval_pruned_prox_model.sh [--dry-run] [NAME...]      names: proxsparse_pruned_model_download.py --list
#
# It downloads what is missing into $models (pruned_models). Results go to $models/NAME.json; one that is there is not
# measured again, so delete it after a change of settings.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
: "${models:=pruned_models}" "${evaluation:=wikitext2;c4}" "${dtype:=auto}" "${device:=auto}" "${ctx_len:=}"
IFS=';' read -r -a texts <<<"$evaluation"

arguments "$@"
listing=$("$python" - ${given[@]+"${given[@]}"} <<'PY'
import sys
from proxsparse.recipes import RELEASED
unknown = [name for name in sys.argv[1:] if name not in RELEASED]
if unknown:
    sys.exit(f"error: there is no released model {unknown[0]!r}; the names are {', '.join(RELEASED)}.")
for name in sys.argv[1:] or RELEASED:
    print(name, *RELEASED[name])
PY
) || exit 2

while read -r name folder learned_ctx_len; do
    fetch=("$python" "$root/proxsparse_pruned_model_download.py" --only "$name" --to "$models")
    measure=("$python" "$root/eval/ppl.py" --model "$models/$folder" --dataset "${texts[@]}"
        --ctx_len "${ctx_len:-$learned_ctx_len}" --dtype "$dtype" --device "$device" --output "$models/$name.json")
    if ((dry_run)); then
        printf '\n# %s\n' "$name"
        printf '%q ' "${fetch[@]}" && printf '\n'
        printf '%q ' "${measure[@]}" && printf '\n'
    elif [[ -e $models/$name.json ]]; then
        printf '\n== %s: measured already (%s)\n' "$name" "$models/$name.json"
    else
        printf '\n== %s\n' "$name"
        [[ -e $models/$folder/.downloaded ]] || "${fetch[@]}" </dev/null
        "${measure[@]}" </dev/null
    fi
done <<<"$listing"
