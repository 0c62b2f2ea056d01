#!/usr/bin/env bash
# OpenLLaMA-7B-v2 with the published settings (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
: "${model_dir:=openlm-research/open_llama_7b_v2}" "${lambda_value:=1.0}" "${learning_rate:=1e-4}" "${ctx_len:=2048}"
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
