#!/usr/bin/env bash
# Text files -> a byte-level BPE with Qwen's rules -> Megatron .bin/.idx -> a look inside.
# Usage: examples/01_text_to_tokens.sh OUT [TEXT_FOLDER]
set -euo pipefail
out=${1:?usage: $0 OUT [TEXT_FOLDER]}
text=${2:-$(python -c 'import json, pathlib; print(pathlib.Path(json.__file__).parent)')}

megatron-qwen data tokenizer "$text" --vocab-size 600 --out "$out/tokenizer"
megatron-qwen data prepare "$text" --tokenizer "$out/tokenizer" --out "$out/data/text" --workers 2
megatron-qwen data inspect "$out/data/text" --tokenizer "$out/tokenizer"
