"""Pre-training recipes: a function that returns a full Recipe with sensible numbers for a model."""

from __future__ import annotations

from pathlib import Path

from megatron_qwen.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe, ScheduleRecipe
from megatron_qwen.training.source import TINY_MODELS

# Peak rates: tiny models bear large ones; a trained model is moved gently; Qwen2.5's own rates are not published.
_TINY_LR = 3e-3
_SCRATCH_LR = 3e-4
_CONTINUE_LR = 1e-5


def pretrain(
    model: str = "tiny",
    data: tuple[tuple[float, str], ...] = (),
    out: str = "run",
    *,
    tokenizer: str | None = None,
) -> Recipe:
    """Return the recipe that `megatron-qwen train pretrain` starts from; every field may then be overridden.

    Args:
        model: `tiny`, `tiny-moe`, a preset name, or a Hugging Face or Megatron folder to continue from.
        data: (weight, prefix) pairs.
        out: run folder.
        tokenizer: folder or file; None takes the model folder's.
    """
    is_tiny = model in TINY_MODELS
    lr = _TINY_LR if is_tiny else _CONTINUE_LR if Path(model).is_dir() else _SCRATCH_LR
    return Recipe(
        out=out,
        model=ModelRecipe(
            source=model,
            seq_length=128 if is_tiny else 4096,
            # Without bf16 hardware, a tiny model is faster in fp32.
            dtype="fp32" if is_tiny else "bf16",
        ),
        data=DataRecipe(blend=data, tokenizer=tokenizer),
        optimizer=OptimizerRecipe(lr=lr),
        schedule=ScheduleRecipe(
            steps=100, micro_batch_size=8 if is_tiny else 1, global_batch_size=16 if is_tiny else 32
        ),
    )
