"""The names of `megatron_qwen.strict_json`, for the modules of this package."""

from megatron_qwen.strict_json import kind, listing, parse_strict_json, read_strict_json, shown

__all__ = ["kind", "listing", "parse_strict_json", "read_strict_json", "shown"]
