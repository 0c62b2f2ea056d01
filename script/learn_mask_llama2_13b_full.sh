#!/usr/bin/env bash
# Llama-2-13B with both regularisers, as published (arXiv 2502.00258). Settings, --dry-run, resuming: script/chain.sh.
: "${model_dir:=meta-llama/Llama-2-13b-hf}" "${lambda_value:=0.5}" "${learning_rate:=1e-4}" "${ctx_len:=4096}"
: "${project_lambda2:=1}" "${lambda2_value:=0.25}" "${epsilon:=0.5}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
