"""Pre-train a small Qwen MoE with shared experts from Python: a recipe is a dataclass, a run is one call.

Needs the output of 01_text_to_tokens.sh. Usage: python examples/03_pretrain_moe.py OUT
On several ranks: torchrun --nproc-per-node 2 examples/03_pretrain_moe.py OUT
"""

import os
import sys
from pathlib import Path

from megatron_qwen.recipes.pretrain import pretrain
from megatron_qwen.training.loop import train
from megatron_qwen.training.overrides import apply_overrides


def main(out: Path) -> None:
    expert_parallel = int(os.environ.get("WORLD_SIZE", "1"))
    corpus = (1.0, str(out / "data" / "text"))
    recipe = pretrain("tiny-moe", (corpus,), str(out / "moe"), tokenizer=str(out / "tokenizer"))
    recipe = apply_overrides(recipe, [f"parallel.ep={expert_parallel}", "schedule.steps=4", "model.seq_length=64"])
    summary = train(recipe)
    print(f"loss {summary.first_loss:.3f} -> {summary.last_loss:.3f}, {summary.tokens_per_second:,.0f} tokens/s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
