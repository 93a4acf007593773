"""Check every row of layouts.csv and estimate its memory per GPU: `python examples/megatron_lm/check_layouts.py`.

The estimate, in bytes on the fullest pipeline stage, at 4,096 tokens per sample:

* weights 2 (bf16) and gradients 4 (fp32) per parameter held by the rank; master weights and two moments, 12 per
  parameter, divided by the data-parallel size (distributed optimizer; expert parameters by their own replicas);
* activations in bf16 without recomputation, per token and layer: what attention and MLP keep for the backward pass,
  divided by tp (sequence parallelism), times the micro-batches in flight under 1F1B (interleaved if vpp > 1);
* logits of the last stage in bf16 and twice fp32 (softmax and its gradient), divided by tp.

Flash attention keeps no score matrix. CUDA context, NCCL buffers and fragmentation are the margin: what is estimated
must stay below 68 of the 80 GB of an H100.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from megatron_qwen.model.config import QwenConfig
from megatron_qwen.model.flags import LaunchSettings, megatron_lm_flags
from megatron_qwen.parallel.layout import ParallelLayout

TABLE = Path(__file__).resolve().parent / "layouts.csv"
SEQ_LENGTH = 4096
LIMIT_BYTES = 68e9
BF16_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    model: str
    settings: LaunchSettings


def read_table(path: Path = TABLE) -> list[Row]:
    """Return the rows as launch settings."""
    with path.open(encoding="utf-8", newline="") as lines:
        return [_row(line) for line in csv.DictReader(lines)]


def _row(line: dict[str, str]) -> Row:
    sizes = {name: int(line[name]) for name in ("tp", "pp", "vpp", "ep", "etp")}
    settings = LaunchSettings(
        layout=ParallelLayout(**sizes, sequence_parallel=sizes["tp"] > 1),
        world_size=int(line["gpus"]),
        seq_length=SEQ_LENGTH,
        micro_batch_size=int(line["micro_batch_size"]),
        global_batch_size=int(line["global_batch_size"]),
        recompute=line["recompute"],
    )
    return Row(model=line["model"], settings=settings)


def estimate_bytes(config: QwenConfig, settings: LaunchSettings) -> float:
    """Return the bytes of the fullest stage; the first one, which also holds the embedding and most micro-batches."""
    layout = settings.layout
    layers = config.num_hidden_layers / layout.pp
    hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * hidden + 2 * kv_size)
    experts = 3 * hidden * config.moe_intermediate_size * config.num_experts
    mlp = 3 * hidden * (config.shared_expert_intermediate_size if config.is_moe else config.intermediate_size)
    embeddings = 1 if layout.pp > 1 or config.tie_word_embeddings else 2
    dense = (layers * (attention + mlp) + embeddings * config.vocab_size * hidden) / layout.tp
    expert = layers * experts / (layout.ep * layout.expert_tensor_parallel_size)

    dense_replicas = settings.world_size / (layout.tp * layout.pp)
    expert_replicas = settings.world_size / (layout.expert_tensor_parallel_size * layout.ep * layout.pp)
    states = 6 * (dense + expert) + 12 * (dense / dense_replicas + expert / expert_replicas)

    # Kept for the backward pass, in elements per token and layer: inputs of the two norms, of the projections and of
    # attention (7 hidden, 2 key-value), and of the MLP three times its width; a chosen expert also its copy of a token.
    width = config.shared_expert_intermediate_size if config.is_moe else config.intermediate_size
    chosen = config.num_experts_per_tok * (2 * hidden + 3 * config.moe_intermediate_size)
    per_layer = BF16_BYTES * (7 * hidden + 2 * kv_size + 3 * width + chosen) / layout.tp
    tokens = SEQ_LENGTH * settings.micro_batch_size
    in_flight = layout.pp + ((layout.pp - 1) / layout.vpp if layout.vpp > 1 else 0)
    logits = tokens * config.vocab_size * (2 + 4 + 4) / layout.tp if layout.pp == 1 else 0
    return states + tokens * per_layer * layers * in_flight + logits


def main() -> None:
    """Print the table; a row that cannot run or does not fit ends the program with an error."""
    for row in read_table():
        config = QwenConfig.from_preset(row.model)
        megatron_lm_flags(config, row.settings)
        needed = estimate_bytes(config, row.settings)
        print(
            f"{row.model:<20} {row.settings.world_size:>4} GPUs  {needed / 1e9:5.1f} GB of {LIMIT_BYTES / 1e9:.0f} GB"
        )
        if needed > LIMIT_BYTES:
            raise SystemExit(f"{row.model} on {row.settings.world_size} GPUs does not fit; raise tp, pp or recompute")


if __name__ == "__main__":
    main()
