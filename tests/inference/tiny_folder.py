"""A tiny model with a real tokenizer, as a Hugging Face folder; shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_qwen.conversion.loading import load_model, read_config
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.inference.engine import Completion, generate
from megatron_qwen.inference.sampling import SamplingParams
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import leave_layout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

PROMPTS = ["def read(self, size):", "for", "return the number of bytes that were read, or None", "import sys\n"]
MODELS: dict[str, Any] = {
    "untied": tiny_dense(),
    "tied": tiny_dense(tied=True, layers=3),
    "moe": tiny_moe(),
}


def write_folder(folder: Path, model: str = "untied", *, style: str = "base") -> Path:
    write_tiny_hf(folder, MODELS[model], seed=5)
    texts = [Path(__file__).read_text(), *PROMPTS] * 2
    QwenTokenizer.train(texts, 300).save(folder, style=style)
    return folder


def enter(layout: ParallelLayout) -> None:
    """Change the layout and keep the process group: a second one cannot be formed over the same store."""
    if torch.distributed.is_initialized() and layout.resolve(torch.distributed.get_world_size()) != groups._active:
        leave_layout()
    groups.initialize(layout)


def complete(
    folder: Path, prompts: list[str], params: SamplingParams, layout: ParallelLayout | None = None
) -> list[Completion]:
    layout = layout or ParallelLayout()
    enter(layout)
    model = load_model(folder, dtype=torch.float32, layout=layout, backend="local")
    return generate(model, QwenTokenizer.load(folder), prompts, params, vocab_size=read_config(folder).vocab_size)
