"""Megatron `torch_dist` checkpoints: global tensors in chunks, without a layout."""
