"""The only file that knows megatron-core versions.

Supported: >=0.16.1,<0.20. pip resolves 0.16.1 on Python below 3.12 and 0.19.x on 3.12 and newer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

from packaging.version import Version

from megatron_qwen.errors import ConfigError

OLDEST = Version("0.16.1")
FIRST_UNSUPPORTED = Version("0.20")


@functools.cache
def megatron_version() -> Version:
    """Return the version of the installed megatron-core.

    Raises:
        ConfigError: none is installed, or one outside >=0.16.1,<0.20.
    """
    try:
        version = Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("megatron-core is not installed; run: pip install 'megatron-core>=0.16.1,<0.20'") from error
    if not OLDEST <= version < FIRST_UNSUPPORTED:
        raise ConfigError(
            f"megatron-core {version} is installed; megatron_qwen supports >={OLDEST},<{FIRST_UNSUPPORTED}. "
            "Run: pip install 'megatron-core>=0.16.1,<0.20'"
        )
    return version


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (not whether it imports)."""
    return importlib.util.find_spec("transformer_engine") is not None


def repair_megatron_core() -> None:
    """Mend what Megatron-Core gets wrong without Transformer Engine, or on CPU tensors. Idempotent.

    Call it after `install_cpu_platform()`, and before a model or an optimizer is built.
    """
    megatron_version()
    _define_te_general_gemm()
    _dispatch_cpu_tensors()
    _use_fused_layout_adam()
    _scale_gradients_in_place()
    _accumulate_weight_gradients_on_cpu()
    _skip_collectives_of_one_rank()
    _save_optimizer_without_bucket_padding()


def _define_te_general_gemm() -> None:
    # 0.16.1 reads te_general_gemm in the router's gating but defines it only if Transformer Engine
    # is there: NameError in any MoE forward. None selects the torch path that follows it.
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def _dispatch_cpu_tensors() -> None:
    # The all-to-all dispatcher asks for split sizes as numpy; Megatron-Core converts CUDA tensors only,
    # and all_to_all_single refuses a tensor there.
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    original = dispatcher.maybe_move_tensor_to_cpu
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        tensor = original(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor

    dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu  # type: ignore[attr-defined]


def _use_fused_layout_adam() -> None:
    # Without Transformer Engine and Apex, DistributedOptimizer's checkpoints do not load (see adam.py).
    optimizer = importlib.import_module("megatron.core.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    if optimizer.USING_PYTORCH_OPTIMIZER:
        from megatron_qwen.parallel.adam import FusedLayoutAdam

        optimizer.Adam = FusedLayoutAdam  # type: ignore[attr-defined]
        optimizer.USING_PYTORCH_OPTIMIZER = False  # type: ignore[attr-defined]
        distributed.Adam = FusedLayoutAdam  # type: ignore[attr-defined]
        distributed.HAVE_APEX_OR_TE = True  # type: ignore[attr-defined]
        distributed.USING_APEX_OPTIMIZER = True  # type: ignore[attr-defined]


def _scale_gradients_in_place() -> None:
    # Clipping without Transformer Engine and Apex makes a scaled copy of every gradient and copies it back, which is
    # 1% of a training step on a CPU.
    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    if clip_grads.multi_tensor_scale_impl is importlib.import_module("megatron.core.utils").local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = _multi_tensor_scale  # type: ignore[attr-defined]


def _multi_tensor_scale(chunk_size: int, noop_flag: Any, tensor_lists: Any, scale: float) -> None:
    import torch

    for source, target in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=target)


def _accumulate_weight_gradients_on_cpu() -> None:
    # `gradient_accumulation_fusion` calls a CUDA extension of apex. On a CPU the same is one GEMM that adds to its
    # output: no gradient of its own for each weight, and no pass to add it.
    import torch

    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    if not torch.cuda.is_available() and not hasattr(layers, "fused_weight_gradient_mlp_cuda"):
        layers.fused_weight_gradient_mlp_cuda = _CpuWeightGradient  # type: ignore[attr-defined]
        layers._grad_accum_fusion_available = True  # type: ignore[attr-defined]


class _CpuWeightGradient:
    """The functions of apex's extension that Megatron-Core calls: main_grad [O, I] += grad_output^T input."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Any, grad_output: Any, main_grad: Any) -> None:
        """Add the gradient of a weight; input [N, I] and grad_output [N, O] in any dtype, main_grad fp32."""
        if main_grad.dtype == grad_output.dtype:
            main_grad.addmm_(grad_output.t(), total_input)
        else:
            main_grad.add_(grad_output.t() @ total_input)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def _skip_collectives_of_one_rank() -> None:
    # Reducing or gathering a DDP bucket in place over one rank changes nothing, and nccl knows that; gloo
    # copies the whole bucket three times per step for it (5% of a step on a CPU).
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        original = getattr(buffers, name)
        if not hasattr(original, "skips_lone_rank"):
            setattr(buffers, name, _unless_in_place_and_alone(original))


def _unless_in_place_and_alone(collective: Any) -> Any:
    @functools.wraps(collective)
    def call(output: Any, source: Any, *, group: Any, async_op: bool = False, **options: Any) -> Any:
        in_place = output.data_ptr() == source.data_ptr() and output.numel() == source.numel()
        if in_place and group.size() == 1 and not async_op:
            return None
        return collective(output, source, group=group, async_op=async_op, **options)

    call.skips_lone_rank = True  # type: ignore[attr-defined]
    return call


def _save_optimizer_without_bucket_padding() -> None:
    # `fully_reshardable` cuts each parameter's master weight and moments out of a buffer whose buckets are joined
    # without the padding at their ends, but at offsets that count it (up to 0.19.2): with more than one bucket (tied
    # embeddings under pipeline parallelism, overlap_grad_reduce) all that follows the first padded bucket is saved
    # shifted, and the last parameter filled up with zeros. Loading is right, so it comes back shifted.
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer").DistributedOptimizer
    original = distributed.sharded_param_state_fully_reshardable
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **options: Any) -> Any:
        maps = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_bucket_padding(buffer)
            return original(self, *args, **options)
        finally:
            for buffer, index_map in zip(self.buffers, maps, strict=True):
                buffer.param_index_map = index_map

    distributed.sharded_param_state_fully_reshardable = sharded_param_state_fully_reshardable


def _without_bucket_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """Return where each parameter of a DDP buffer lies (start, end, bucket) once the buckets' padding is taken out."""
    padding = [0]
    for bucket in buffer.buckets:
        padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        parameter: (start - padding[bucket], end - padding[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


def is_megatron_loaded() -> bool:
    """Whether megatron-core has been imported in this process."""
    return "megatron.core" in sys.modules


def async_save_arguments() -> dict[str, str]:
    """Keyword arguments that make `TorchDistSaveShardedStrategy.async_save` use Megatron-Core's own writer.

    0.19 takes the writer's name and defaults to that of nvidia-resiliency-ext; 0.16 has no choice.
    """
    return {"async_strategy": "mcore"} if megatron_version() >= Version("0.17") else {}


def reads_common_state_from_shards() -> bool:
    """Whether this Megatron-Core opens a `torch_dist` folder without common.pt, as 0.19 writes it; 0.16 does not."""
    serialization = importlib.import_module("megatron.core.dist_checkpointing.serialization")
    return hasattr(serialization, "_legacy_common_state_exists")


def inference_mode() -> contextlib.AbstractContextManager[None]:
    """Return a context in which Megatron-Core's modules know that they generate text.

    0.19 keeps a process-wide flag and computes logits of the last token only while it is set; 0.16 goes
    by `model.training` and the inference context.
    """
    utils = importlib.import_module("megatron.core.inference.utils")
    mode = getattr(utils, "InferenceMode", None)
    return contextlib.nullcontext() if mode is None else mode.active()


def experts_have_own_optimizer(*, tp: int, ep: int, etp: int) -> bool:
    """Whether Megatron-Core chains an optimizer for routed experts behind that of the other parameters.

    It does where experts are reduced over other ranks: always with expert parallelism, and since 0.17 also where their
    tensor-parallel size is another.
    """
    return ep > 1 or (etp != tp and megatron_version() >= Version("0.17"))


def aux_loss_gradient_factor(tp: int, cp: int) -> int:
    """Return what the MoE aux-loss coefficient must be multiplied by under `calculate_per_token_loss`.

    There the router multiplies the aux loss by its local tokens, to undo the later division by all tokens. 0.16.1
    forgets that sequence and context parallel ranks hold 1/(tp*cp) of the tokens each, and their gradients come out
    that much too small; fixed by 0.19. The reported value divides by the coefficient and is not affected.
    """
    return tp * cp if megatron_version() < Version("0.17") else 1


def take_moe_aux_losses() -> Any:
    """Return this rank's aux losses since the last call, per layer (1-D float tensor), and reset them.

    They are summed over micro-batches, without the coefficient, and not reduced over any rank. A rank that holds no
    MoE layer, or a dense model, gets a tensor of one zero.
    """
    import torch

    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None:
        logging_module = importlib.import_module("megatron.core.transformer.moe.moe_logging")
        values = [entry.values for entry in logging_module.get_moe_metrics_tracker().metrics.values()]
    else:
        values = [entry["values"] for entry in moe_utils.get_moe_layer_wise_logging_tracker().values()]
    if not values:
        return torch.zeros(1)
    total = torch.stack(values).sum(dim=0)
    for tensor in values:
        tensor.zero_()
    return total


def repair_expert_grad_norm(optimizers: Sequence[Any]) -> None:
    """Let the gradient norm count every expert under TP x EP (Megatron-LM issue 5916).

    0.16.1 takes a parameter that is not split over TP as one that TP ranks above 0 hold again, and leaves it out of
    the norm there. Experts that are not split over TP (etp 1) are different ones on each of those ranks. Fixed in
    0.19, which asks the experts' own TP group; here the optimizers of experts get that group.

    Args:
        optimizers: the members of Megatron's ChainedOptimizer; each holds experts only or none.
    """
    from megatron.core import parallel_state

    if megatron_version() >= Version("0.17"):
        return
    for optimizer in optimizers:
        if any(group.get("is_expert_parallel") for group in optimizer.param_groups):
            optimizer.tp_group = parallel_state.get_expert_tensor_parallel_group()


def experts_of_a_layer(module: type, submodules: Any) -> Any:
    """Return what a spec provider's `grouped_mlp_modules` returns: a builder since 0.17, a pair before."""
    if megatron_version() >= Version("0.17"):
        return functools.partial(module, submodules=submodules)
    return module, submodules


def moe_of_a_layer(module: type, router: type, moe: Any) -> Any:
    """Return the MLP of a layer's spec with subclasses of Megatron-Core's MoELayer and TopKRouter in their places.

    Args:
        module: the MoE layer.
        router: its router.
        moe: what Megatron-Core's `get_mlp_module_spec_for_backend` returns: a builder since 0.17, a spec before.
    """
    if megatron_version() >= Version("0.17"):
        submodules = moe.keywords["submodules"]
        return functools.partial(module, submodules=dataclasses.replace(submodules, router=router))
    return dataclasses.replace(moe, module=module, submodules=dataclasses.replace(moe.submodules, router=router))


def with_process_groups(submodules: Any, pg_collection: Any) -> Any:
    """Return a layer's submodules such that its MoE layer, a subclass, is built with the layer's process groups.

    Before 0.17, a layer hands them to exactly MoELayer and warns of any other class; since then to all MLPs.
    """
    moe_layer = importlib.import_module("megatron.core.transformer.moe.moe_layer").MoELayer
    mlp = submodules.mlp
    module = getattr(mlp, "module", None)
    is_subclass = isinstance(module, type) and issubclass(module, moe_layer) and module is not moe_layer
    if megatron_version() >= Version("0.17") or not is_subclass:
        return submodules
    params = {**mlp.params, "pg_collection": pg_collection}
    built_as_it_is = types.SimpleNamespace(module=module, submodules=mlp.submodules, params=params)
    return dataclasses.replace(submodules, mlp=built_as_it_is)


def of_data_parallel_ranks() -> dict[str, bool]:
    """Keyword arguments that say to Megatron-Core's table of MoE losses that one is the same on data-parallel ranks."""
    return {"needs_dp_avg": False} if megatron_version() >= Version("0.17") else {"reduce_group_has_dp": True}


def has_apex_gradient_fusion() -> bool:
    """Whether apex's fused weight-gradient accumulation kernel is installed."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def quiet_dependencies() -> None:
    """Hide the warnings of Megatron-Core and torch about what is not installed or will be renamed.

    For command lines, before megatron is imported: `doctor` says what is missing, and none of it is the user's to mend.
    """
    for module in (r"megatron\.", r"torch\.distributed\.", r"torch\._jit_internal", r"torch\.jit"):
        warnings.filterwarnings("ignore", module=module)
