# Prune a model with $prune_method. Every baseline_*.sh sources this file.
#
#   bash script/baseline_METHOD.sh MODEL --save FOLDER [flags of baseline/main.py]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ $# -eq 0 || $1 == -* ]]; then
    echo "error: give a model first: bash script/baseline_$prune_method.sh MODEL --save FOLDER [flags of baseline/main.py]" >&2
    exit 2
fi
model=$1
shift
exec "$python" "$root/baseline/main.py" --model "$model" --prune_method "$prune_method" "$@"
