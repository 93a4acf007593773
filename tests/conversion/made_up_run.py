"""A small run with a made-up plain optimizer, as per-rank files, without Megatron."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_qwen.conversion import import_hf
from megatron_qwen.conversion.formats.legacy.layout import rank_files
from megatron_qwen.conversion.optimizer.layout import members
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import write_tiny_hf

QUIET: dict[str, Any] = {"progress": False, "allow_pickle": True}


def group(decays: bool, is_expert: bool = False) -> dict[str, Any]:
    return {
        "wd_mult": float(decays),
        "lr_mult": 1.0,
        "is_expert_parallel": is_expert,
        "is_decoupled_lr": False,
        "lr": 1e-3,
        "betas": (0.9, 0.95),
        "step": 7,
    }


def run_at(root: Path, config: QwenConfig, layout: ParallelLayout) -> Path:
    """Write weights, and beside them a plain optimizer after step 7: masters as the weights, moments random."""
    write_tiny_hf(root / "hf", config, dtype=torch.bfloat16)
    import_hf(root / "hf", root / "run", ckpt_format="torch", layout=layout, progress=False)
    (root / "run" / "release").rename(root / "run" / "iter_0000007")
    (root / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    (root / "run" / "iter_0000007" / "manifest.json").unlink()
    for file in rank_files(config, layout):
        path = rank_path(root / "run", file.folder)
        content = load(path)
        weights = {name: value for chunk in file.chunks for name, value in content[chunk.key].items()}
        chain = members(file, layout, is_tied=config.tie_word_embeddings, splits_experts=layout.ep > 1)
        parts = [plain_state(member, weights) for member in chain]
        optimizer = parts if len(parts) > 1 else parts[0]
        save(path, content | {"iteration": 7, "optimizer": optimizer, "opt_param_scheduler": {"num_steps": 7}})
    return root / "run"


def plain_state(member: Any, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    state, groups, masters, number = {}, [], [], 0
    for each in member.groups:
        numbers = []
        for tensor in each.tensors:
            # Ranks that hold copies hold the same: the values follow from the name.
            generator = torch.Generator().manual_seed(tensor.parameter.layer or 0)
            moments = {role: torch.rand(tensor.shape, generator=generator) for role in ("exp_avg", "exp_avg_sq")}
            if tensor.vocabulary_rows is not None and tensor.shard.rank == tensor.shard.size - 1:
                padding = tensor.vocabulary_rows - tensor.parameter.shape[0]
                for moment in moments.values():
                    moment[len(moment) - padding :] = 0
            state[number] = moments
            numbers.append(number)
            number += 1
        groups.append(group(each.decays, member.is_expert) | {"params": numbers})
        masters.append([weights[tensor.name].float() for tensor in each.tensors])
    return {"optimizer": {"state": state, "param_groups": groups}, "fp32_from_fp16_params": masters}


def rank_path(run: Path, folder: str, name: str = "model_optim_rng.pt") -> Path:
    return run / "iter_0000007" / folder / name


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def save(path: Path, content: Any) -> None:
    torch.save(content, path)


def change(run: Path, folder: str, edit: Callable[[Any], None], name: str = "model_optim_rng.pt") -> None:
    path = rank_path(run, folder, name)
    content = load(path)
    edit(content)
    save(path, content)
