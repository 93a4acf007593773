"""Rotary embedding in place by the CUDA kernel of the extension, which is built with that of `qkv_rope`."""

from ..qkv_rope.cuda import launch_rope as launch_rope
