"""Checks of arguments that operations share; every message names the argument, what it is and what it should be."""

from __future__ import annotations

import torch

from ..errors import ConfigError


def require_floating(op: str, name: str, tensor: torch.Tensor) -> None:
    """Raise ConfigError unless `tensor` is floating point with at least one axis."""
    if not tensor.is_floating_point():
        raise ConfigError(f"{op}: {name} has dtype {tensor.dtype}; expected a floating dtype")
    if tensor.dim() == 0:
        raise ConfigError(f"{op}: {name} is a scalar; expected at least one axis")


def require_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless `tensor` has exactly this shape."""
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {shape}")


def require_device(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, like_name: str) -> None:
    """Raise ConfigError unless both tensors are on one device."""
    if tensor.device != like.device:
        raise ConfigError(f"{op}: {name} is on {tensor.device}; expected {like.device}, where {like_name} is")


def require_dtype(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ConfigError unless `tensor` has this dtype."""
    if tensor.dtype != dtype:
        raise ConfigError(f"{op}: {name} has dtype {tensor.dtype}; expected {dtype}")


def as_rows(op: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a view [rows, last axis] for a kernel that takes one row stride and neighbouring columns.

    Raises:
        ConfigError: no such view exists. It is never copied: in a training step that would go unnoticed.
    """
    rows = tensor.numel() // tensor.shape[-1]
    try:
        view = tensor.view(rows, tensor.shape[-1])
    except RuntimeError as error:
        raise _bad_strides(op, name, tensor) from error
    if view.shape[1] > 1 and view.stride(1) != 1:
        raise _bad_strides(op, name, tensor)
    return view


def gradient_as_rows(grad: torch.Tensor) -> torch.Tensor:
    """Return grad [..., H] as contiguous [rows, H]; one that autograd expanded (that of a sum) is copied out."""
    return grad.contiguous().view(-1, grad.shape[-1])


def _bad_strides(op: str, name: str, tensor: torch.Tensor) -> ConfigError:
    return ConfigError(
        f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; expected rows at one distance "
        "and stride 1 within a row: call .contiguous() first"
    )
