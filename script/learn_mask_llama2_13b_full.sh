#!/usr/bin/env bash
# Llama-2-13B with both regularisers, as published (arXiv 2502.00258). Settings, --dry-run and resuming: see script/chain.sh.
recipe=llama2-13b-full
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
