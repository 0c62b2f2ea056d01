#!/usr/bin/env bash
# Llama-3.1-8B with both regularisers, as published (arXiv 2502.00258). Settings, --dry-run, resuming: script/chain.sh.
: "${model_dir:=meta-llama/Llama-3.1-8B}" "${lambda_value:=0.85}" "${learning_rate:=5e-5}" "${ctx_len:=4096}"
: "${project_lambda2:=1}" "${lambda2_value:=1.0}" "${epsilon:=0.1}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
