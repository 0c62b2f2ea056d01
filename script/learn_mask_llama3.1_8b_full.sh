#!/usr/bin/env bash
# Learn a mask for Llama-3.1-8B with the paper's settings and both regularisers (arXiv 2502.00258).
# script/chain.sh explains its settings, --dry-run, and how to go on after a stop.
recipe=llama3.1-8b-full
source "$(dirname "${BASH_SOURCE[0]}")/chain.sh"
