#!/usr/bin/env bash
# Pre-train a Qwen model with an unmodified Megatron-LM on this node (or, under Slurm, on every node: see ../slurm/).
#
#   MEGATRON_LM=/path/to/Megatron-LM examples/megatron_lm/pretrain.sh MODEL GPUS TOKENIZER_DIR DATA_PREFIX OUT_DIR [flags...]
#
#   MODEL GPUS     a row of layouts.csv: the layout, micro-batch and global batch come from there
#   TOKENIZER_DIR  Hugging Face folder with tokenizer.json
#   DATA_PREFIX    what `megatron-qwen data prepare` wrote, without .bin/.idx
#   flags...       handed to pretrain_gpt.py last, so they win
#
# Environment: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, GPUS_PER_NODE (8), TRAIN_ITERS (1000), LR (3e-4),
#   SPEC=function|object|none (object for Megatron-LM before 0.19), DRY_RUN=1 to print the command and stop.
set -euo pipefail

if [ $# -lt 5 ]; then
    sed -n '2,13p' "${BASH_SOURCE[0]}" | cut -c3- >&2
    exit 2
fi
MODEL=$1 GPUS=$2 TOKENIZER=$3 DATA=$4 OUT=$5
shift 5
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-$((GPUS / GPUS_PER_NODE))}
TRAIN_ITERS=${TRAIN_ITERS:-1000}

row=$(grep "^$MODEL,$GPUS," "$here/layouts.csv") || {
    echo "no layout for $MODEL on $GPUS GPUs in $here/layouts.csv; it has:" >&2
    cut -d, -f1,2 "$here/layouts.csv" | tail -n +2 >&2
    exit 2
}
IFS=, read -r _ _ tp pp vpp ep etp micro_batch_size global_batch_size recompute <<<"$row"

# Defines GPT_MODEL_ARGS, MOE_ARGS (MoE models only), MODEL_PARALLEL_ARGS and TRAINING_ARGS.
MOE_ARGS=()
arrays=$(megatron-qwen flags "$MODEL" --gpus "$GPUS" --tp "$tp" --pp "$pp" --vpp "$vpp" --ep "$ep" --etp "$etp" \
    --micro-batch-size "$micro_batch_size" --global-batch-size "$global_batch_size" --recompute "$recompute" \
    --seq-length 4096 --tokenizer "$TOKENIZER" --spec "${SPEC:-function}")
eval "$arrays"

OPTIMIZER_ARGS=(
    --lr "${LR:-3e-4}" --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters $((TRAIN_ITERS / 50 + 1))
    --train-iters "$TRAIN_ITERS" --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
)
DATA_ARGS=(--data-path "$DATA" --split 98,2,0)
EVAL_AND_LOGGING_ARGS=(
    --log-interval 1 --log-throughput --eval-interval 200 --eval-iters 10 --tensorboard-dir "$OUT/tensorboard"
    --save "$OUT/checkpoints" --load "$OUT/checkpoints" --save-interval 200 --ckpt-format torch_dist
)
DISTRIBUTED_ARGS=(
    --nproc_per_node "$GPUS_PER_NODE" --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}"
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-29500}"
)

command=(
    torchrun "${DISTRIBUTED_ARGS[@]}" "${MEGATRON_LM:?set MEGATRON_LM to a checkout of Megatron-LM}/pretrain_gpt.py"
    "${GPT_MODEL_ARGS[@]}" "${MOE_ARGS[@]}" "${MODEL_PARALLEL_ARGS[@]}" "${TRAINING_ARGS[@]}"
    "${OPTIMIZER_ARGS[@]}" "${DATA_ARGS[@]}" "${EVAL_AND_LOGGING_ARGS[@]}" "$@"
)
if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
# One queue keeps communication and computation in the order that tensor and sequence parallelism rely on.
export CUDA_DEVICE_MAX_CONNECTIONS=1
exec "${command[@]}"
