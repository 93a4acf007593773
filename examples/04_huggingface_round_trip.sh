#!/usr/bin/env bash
# Megatron -> Hugging Face -> Megatron, and the proof that no bit changed.
# Needs the output of 02_pretrain_dense.sh. Usage: examples/04_huggingface_round_trip.sh OUT
set -euo pipefail
out=${1:?usage: $0 OUT}

megatron-qwen convert export "$out/dense" "$out/dense-hf"
megatron-qwen convert import "$out/dense-hf" "$out/dense-again"
megatron-qwen convert verify "$out/dense" "$out/dense-again"
megatron-qwen convert verify "$out/dense-hf" "$out/dense-again"
