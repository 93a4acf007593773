"""transformers as an independent judge: its logits, computed in a process of its own.

A process of its own because the CPU stand-in for `torch.cuda` (parallel/device.py) must never be
loaded next to the library that judges it, and because the judge should see the files only.

Shapes: B sequences, S tokens each, V vocabulary rows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_qwen.errors import MismatchError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DTYPES = ("float32", "bfloat16")


def transformers_logits(
    folder: Path, token_ids_BS: NDArray[np.int64], *, dtype: str = "float32"
) -> NDArray[np.float32]:
    """Return the logits [B, S, V] (fp32) that transformers computes for a Hugging Face folder.

    Args:
        folder: Hugging Face folder with config.json and safetensors.
        token_ids_BS: int64 token ids.
        dtype: "float32" or "bfloat16", the dtype transformers computes in.

    Raises:
        MismatchError: transformers could not load the folder, or left weights newly initialised;
            the message carries its own output.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="qwen-judge-") as scratch:
        tokens, logits = Path(scratch) / "tokens.npy", Path(scratch) / "logits.npy"
        np.save(tokens, token_ids_BS)
        command = [sys.executable, "-m", __name__, str(folder), str(tokens), str(logits), dtype]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise MismatchError(f"{folder}: transformers cannot use this folder.\n{result.stdout}{result.stderr}")
        loaded: NDArray[np.float32] = np.load(logits)
        return loaded


def _run(folder: str, tokens: str, logits: str, dtype: str) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {_DTYPES}")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    # A missing tensor is initialised at random without an exception: the judge refuses instead.
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    problems = {kind: sorted(report[kind]) for kind in kinds if report[kind]}
    if problems:
        raise SystemExit(f"transformers loaded {folder} with {problems}")
    with torch.no_grad():
        output = model.eval()(torch.from_numpy(np.load(tokens))).logits
    np.save(logits, output.float().numpy())


if __name__ == "__main__":
    _run(*sys.argv[1:])
