#!/usr/bin/env bash
# Llama-2-7B with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
: "${model_dir:=meta-llama/Llama-2-7b-hf}" "${lambda_value:=0.25}" "${learning_rate:=1e-4}" "${ctx_len:=4096}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
