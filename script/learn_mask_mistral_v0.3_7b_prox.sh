#!/usr/bin/env bash
# Mistral-7B-v0.3 with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
: "${model_dir:=mistralai/Mistral-7B-v0.3}" "${lambda_value:=25.0}" "${learning_rate:=5e-5}" "${ctx_len:=4096}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
