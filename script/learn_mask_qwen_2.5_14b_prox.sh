#!/usr/bin/env bash
# Qwen2.5-14B with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
: "${model_dir:=Qwen/Qwen2.5-14B}" "${lambda_value:=0.2}" "${learning_rate:=1e-4}" "${ctx_len:=4096}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
