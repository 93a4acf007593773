"""Just enough of Transformer Engine for megatron-core to build a model of its Transformer Engine spec, not to run it.

The modules here have Transformer Engine's parameters (names, shapes and order of its PyTorch modules); which of them
sits where, under which name and cut in which way is megatron-core's own doing. Install it before megatron is imported.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from unittest.mock import MagicMock

import torch


class _WithExtraState(torch.nn.Module):
    """As the linear layers: an entry in the state dict for FP8 scales, None without them."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        assert state is None or state.numel() == 0


class Linear(_WithExtraState):
    def __init__(self, in_features, out_features, *, bias=True, parallel_mode=None, tp_size=1, **_):
        super().__init__()
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = torch.nn.Parameter(torch.zeros(rows, columns))
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(rows))


class LayerNormLinear(_WithExtraState):
    def __init__(self, in_features, out_features, *, bias=True, parallel_mode=None, tp_size=1, **_):
        super().__init__()
        assert parallel_mode == "column"
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features))
        self.weight = torch.nn.Parameter(torch.zeros(out_features // tp_size, in_features))
        if bias:
            self.bias = torch.nn.Parameter(torch.zeros(out_features // tp_size))


class GroupedLinear(_WithExtraState):
    def init_fp8_metadata(self, **_):
        pass

    def __init__(self, num_gemms, in_features, out_features, *, bias=True, parallel_mode=None, tp_size=1, **_):
        super().__init__()
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        for i in range(num_gemms):
            self.register_parameter(f"weight{i}", torch.nn.Parameter(torch.zeros(rows, columns)))


class RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size=None, *, normalized_shape=None, **_):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size or normalized_shape))


class DotProductAttention(torch.nn.Module):
    def __init__(self, *_, **__):
        super().__init__()


class _Anything(types.ModuleType):
    """A module in which every name is there."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformer_engine":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        if module.__name__ == "transformer_engine":
            module.__version__ = "2.0.0"
        elif module.__name__ == "transformer_engine.pytorch.cpu_offload":
            module.get_cpu_offload_context = lambda *_, **__: (contextlib.nullcontext(), None)
        elif module.__name__ == "transformer_engine.pytorch":
            for part in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
                setattr(module, part.__name__, part)


def install() -> None:
    """Let `import transformer_engine` find the stand-in."""
    sys.meta_path.insert(0, _Finder())
    import transformer_engine.pytorch  # noqa: F401
