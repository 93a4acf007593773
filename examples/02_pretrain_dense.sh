#!/usr/bin/env bash
# Pre-train a small dense Qwen2.5 with tensor and pipeline parallelism, then go on from its checkpoint.
# Needs the output of 01_text_to_tokens.sh. Usage: examples/02_pretrain_dense.sh OUT
set -euo pipefail
out=${1:?usage: $0 OUT}
run() {
    megatron-qwen train pretrain --model tiny --data "$out/data/text" --tokenizer "$out/tokenizer" --out "$out/dense" \
        --nproc 4 --tp 2 --pp 2 --micro-batch-size 2 --global-batch-size 4 --seq-length 64 --steps 6 "$@"
}
run --stop-at 4 # as a job with a time limit would
run             # finds the checkpoint of step 4 and goes on
