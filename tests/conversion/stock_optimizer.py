"""Stock Megatron-Core models and optimizers, their checkpoints as Megatron-LM writes them, and what is in them."""

from __future__ import annotations

import zlib
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stock_model import enter, stock_chunks

from megatron_qwen.conversion.formats.legacy.layout import folder_name
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout


@dataclass
class Stock:
    """One rank's model chunks (wrapped in DDP) and optimizer."""

    chunks: list[Any]
    optimizer: Any
    layout: ParallelLayout

    def step(self, seed: int) -> None:
        """Update once with gradients drawn per parameter name: ranks that hold copies of one keep them equal."""
        for chunk in self.chunks:
            is_tied = chunk.module.share_embeddings_and_output_weights
            for name, parameter in chunk.module.named_parameters():
                origin = "embedding.word_embeddings.weight" if is_tied and name == "output_layer.weight" else name
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {origin}".encode()))
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        self.optimizer.step()

    def members(self) -> list[Any]:
        return list(self.optimizer.chained_optimizers)

    def snapshot(self) -> list[torch.Tensor]:
        """Return weights, and everything the optimizer keeps, in its order."""
        tensors = [parameter.detach().clone() for chunk in self.chunks for parameter in chunk.module.parameters()]
        for member in self.members():
            for group in member.optimizer.param_groups:
                tensors.append(torch.tensor([float(group["step"]), group["lr"], group["wd_mult"]]))
                for parameter in group["params"]:
                    tensors.append(parameter.detach().clone())
                    state = member.optimizer.state[parameter]
                    tensors += [state[name].clone() for name in ("exp_avg", "exp_avg_sq")]
        return tensors


def build(
    config: QwenConfig,
    layout: ParallelLayout,
    *,
    distributed: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    bucket_size: int | None = None,
    lr: float = 1e-2,
    min_lr: float | None = None,
) -> Stock:
    """Megatron's model with Megatron's local spec, DDP and optimizer; of ours only the configuration."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

    enter(layout)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        bucket_size=bucket_size,
        overlap_grad_reduce=bucket_size is not None,
    )
    chunks = [
        DistributedDataParallel(model.config, ddp_config, model, disable_bucketing=number > 0)
        for number, model in enumerate(stock_chunks(config, layout, dtype=dtype))
    ]
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=0.1,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        clip_grad=1.0,
    )
    overrides = get_standard_config_overrides(optimizer_config)
    return Stock(chunks, get_megatron_optimizer(optimizer_config, chunks, config_overrides=overrides), layout)


def metadata(distributed: bool) -> dict[str, Any]:
    """Return what Megatron-LM passes to `sharded_state_dict` by default."""
    from megatron.core import parallel_state

    return {
        **({"distrib_optim_sharding_type": "fully_reshardable"} if distributed else {}),
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded_state(stock: Stock, distributed: bool, *, is_loading: bool) -> dict[str, Any]:
    """Return model and optimizer for `dist_checkpointing`."""
    described = metadata(distributed)
    keys = ["model"] if len(stock.chunks) == 1 else [f"model{number}" for number in range(len(stock.chunks))]
    state = {
        key: chunk.module.sharded_state_dict(metadata=described) for key, chunk in zip(keys, stock.chunks, strict=True)
    }
    state["optimizer"] = stock.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=described)
    return state


def save_torch_dist(stock: Stock, folder: Path, step: int, *, distributed: bool) -> None:
    """Save as Megatron-LM does with --ckpt-format torch_dist; `folder` is the run's."""
    from megatron.core import dist_checkpointing

    target = folder / f"iter_{step:07d}"
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    torch.distributed.barrier()
    state = sharded_state(stock, distributed, is_loading=False)
    dist_checkpointing.save({**state, "iteration": step, "checkpoint_version": 3.0}, str(target))


def load_torch_dist(stock: Stock, folder: Path, step: int, *, distributed: bool) -> None:
    """Load with stock `dist_checkpointing`, strictly."""
    from megatron.core import dist_checkpointing

    from megatron_qwen.checkpoint.optimizer_state import fit_to_optimizers

    state = sharded_state(stock, distributed, is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder / f"iter_{step:07d}"), strict="raise_all")
    keys = ["model"] if len(stock.chunks) == 1 else [f"model{number}" for number in range(len(stock.chunks))]
    for key, chunk in zip(keys, stock.chunks, strict=True):
        chunk.module.load_state_dict(loaded[key])
    stock.optimizer.load_state_dict(fit_to_optimizers(loaded["optimizer"], stock.optimizer))


def scheduler_state(optimizer: Any, step: int) -> dict[str, Any]:
    """Return what Megatron-LM saves of its schedule, which counts samples."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=1600,
        lr_decay_style="constant",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1600,
        wd_incr_style="constant",
    )
    scheduler.num_steps = 16 * step
    return dict(scheduler.state_dict())


def _rank_folder(folder: Path, step: int, layout: ParallelLayout) -> Path:
    from megatron.core import parallel_state

    name = folder_name(
        layout,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
    )
    return folder / f"iter_{step:07d}" / name


def save_legacy(stock: Stock, config: QwenConfig, folder: Path, step: int, *, distributed: bool) -> None:
    """Save as Megatron-LM's save_checkpoint does with --ckpt-format torch."""
    from megatron.core import parallel_state

    from megatron_qwen.conversion.formats.megatron_lm_args import megatron_lm_args

    arguments = {
        **vars(megatron_lm_args(config, stock.layout, ckpt_format="torch", transformer_impl="local")),
        "consumed_train_samples": 16 * step,
        "global_batch_size": 16,
        "seq_length": 8,
    }
    keys = ["model"] if len(stock.chunks) == 1 else [f"model{number}" for number in range(len(stock.chunks))]
    state: dict[str, Any] = {
        "args": Namespace(
            **{**arguments, "consumed_train_samples": 16 * step, "global_batch_size": 16, "seq_length": 8}
        ),
        "checkpoint_version": 3.0,
        "iteration": step,
        "num_floating_point_operations_so_far": 0,
        **{key: chunk.module.state_dict_for_save_checkpoint() for key, chunk in zip(keys, stock.chunks, strict=True)},
        "optimizer": stock.optimizer.state_dict(),
        "opt_param_scheduler": scheduler_state(stock.optimizer, step),
        "rng_state": [{"torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}],
    }
    place = _rank_folder(folder, step, stock.layout)
    place.mkdir(parents=True, exist_ok=True)
    if distributed:
        stock.optimizer.save_parameter_state(str(place / "distrib_optim.pt"))
    dense = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_rank()
    if dense == 0 or (config.is_moe and experts == 0):
        torch.save(state, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))
    torch.distributed.barrier()


def load_legacy(stock: Stock, folder: Path, step: int, *, distributed: bool) -> None:
    """Load as Megatron-LM's load_checkpoint does."""
    place = _rank_folder(folder, step, stock.layout)
    state = torch.load(place / "model_optim_rng.pt", map_location="cpu", weights_only=False)
    assert state["iteration"] == step
    keys = ["model"] if len(stock.chunks) == 1 else [f"model{number}" for number in range(len(stock.chunks))]
    for key, chunk in zip(keys, stock.chunks, strict=True):
        chunk.module.load_state_dict(state[key], strict=True)
    stock.optimizer.load_state_dict(state["optimizer"])
    if distributed:
        with torch.no_grad():  # stock forgets it, which float32 parameters do not forgive
            stock.optimizer.load_parameter_state(str(place / "distrib_optim.pt"))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two snapshots are equal to the last bit."""
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )
