#!/usr/bin/env bash
# Generate text from a Megatron folder and from a Hugging Face folder, on one rank and on two.
# Needs the output of 04_huggingface_round_trip.sh. Usage: examples/05_generate.sh OUT
set -euo pipefail
out=${1:?usage: $0 OUT}

megatron-qwen generate "$out/dense" --prompt "def main(" --max-new-tokens 16 --greedy
megatron-qwen generate "$out/dense-hf" --prompt "def main(" --max-new-tokens 16 --greedy --nproc 2 --tp 2
