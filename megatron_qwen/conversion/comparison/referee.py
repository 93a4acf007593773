"""transformers as the side that is right: its own forward pass of a Hugging Face folder, layer by layer.

It runs in a process of its own, which leaves every layer's input and the outputs of its norms, attention and MLP in a
temporary folder. That process holds the whole model in fp32.

Shapes: S tokens, B sequences (one), H hidden size.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_qwen.conversion.comparison.layer_trace import LAYER, Tape
from megatron_qwen.errors import MismatchError

# transformers' submodules of a decoder layer by the name of their counterpart in Megatron.
_MODULES = {
    "input_layernorm": "input_layernorm",
    "self_attention": "self_attn",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp": "mlp",
}


class TransformersTeacher:
    """What transformers computes; a context manager that owns the temporary folder."""

    def __init__(self, folder: Path, ids_S: Tensor) -> None:
        """Remember what to run: a Hugging Face folder on the ids [S]."""
        self._folder, self._ids_S = folder, ids_S

    def __enter__(self) -> TransformersTeacher:
        """Run transformers.

        Raises:
            MismatchError: it cannot use the folder; its own words are passed on.
        """
        self._scratch = tempfile.TemporaryDirectory(prefix="qwen-referee-")
        self._out = Path(self._scratch.name)
        save_file({"ids": self._ids_S.contiguous()}, self._out / "ids")
        command = [sys.executable, "-m", __name__, str(self._folder), str(self._out)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            self._scratch.cleanup()
            raise MismatchError(f"{self._folder}: transformers cannot use this folder.\n{result.stdout}{result.stderr}")
        self._logits_SV: Tensor = load_file(self._out / "logits")["logits"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the temporary folder."""
        self._scratch.cleanup()

    def embedding(self) -> Tensor:
        """Return the embedded tokens [S, 1, H]."""
        return self.layer(0, None)[f"{LAYER}:in"][0]

    def layer(self, number: int, _: Tensor | None) -> Tape:
        """Return what passed through the layer's modules; it ran on transformers' own input."""
        return {site: (tensor,) for site, tensor in load_file(self._out / f"layer-{number}").items()}

    def final_norm(self, _: Tensor) -> Tensor:
        """Return the normalised output of the last layer."""
        return load_file(self._out / "norm")["norm"]

    def logits(self, _: Tensor, begin: int, end: int) -> Tensor:
        """Return the logits [S, end - begin] of these vocabulary rows."""
        return self._logits_SV[:, begin:end]


def _run(folder: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # A missing tensor is initialised at random without an exception: the referee refuses instead.
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = {kind: sorted(report[kind]) for kind in kinds if report[kind]}
    if problems:
        raise SystemExit(f"transformers loaded {folder} with {problems}")
    for number, layer in enumerate(model.model.layers):
        _keep(layer, Path(out) / f"layer-{number}")
    model.model.norm.register_forward_hook(
        lambda module, args, output: save_file({"norm": _megatron_layout(output)}, Path(out) / "norm")
    )
    ids_BS = load_file(Path(out) / "ids")["ids"].unsqueeze(0)
    with torch.no_grad():
        logits = model.eval()(ids_BS, use_cache=False).logits
    save_file({"logits": logits[0].float().contiguous()}, Path(out) / "logits")


def _keep(layer: Any, path: Path) -> None:
    """Write a layer's tensors when it is done."""
    kept: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[site] = _megatron_layout(output)

        return hook

    def before(module: Any, args: Any, kwargs: Any) -> None:
        kept[f"{LAYER}:in"] = _megatron_layout(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: Any, output: Any) -> None:
        kept[f"{LAYER}:out"] = _megatron_layout(output)
        save_file(kept, path)
        kept.clear()

    layer.register_forward_pre_hook(before, with_kwargs=True)
    for name, theirs in _MODULES.items():
        getattr(layer, theirs).register_forward_hook(keep(f"{name}:out"))
    layer.register_forward_hook(after)


def _megatron_layout(output: Any) -> Tensor:
    """Return [S, B, H] of [B, S, H], or of the first of several outputs."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor.detach().transpose(0, 1).contiguous().clone()


if __name__ == "__main__":
    _run(*sys.argv[1:])
