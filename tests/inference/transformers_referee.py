"""What transformers answers, computed in a process of its own: `python transformers_referee.py IN OUT`.

IN is a torch file with a list of requests; OUT gets the list of answers. Kinds of request:
- {"processor": name, "arguments": {...}, "ids": [B, S], "logits": [B, V]}: the processed logits;
- {"folder": path, "prompts": [[ids], ...], "max_new_tokens": n, "options": {...}}: greedy completions,
  one prompt at a time, as lists of new tokens.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def ask_transformers(requests: list[dict[str, Any]]) -> list[Any]:
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "in.pt", Path(scratch) / "out.pt"
        torch.save(requests, source)
        command = [sys.executable, str(Path(__file__).resolve()), str(source), str(target)]
        subprocess.run(command, check=True, timeout=300)
        answers: list[Any] = torch.load(target)
        return answers


def _answer(request: dict[str, Any]) -> Any:
    if "processor" in request:
        from transformers.generation import logits_process

        processor = getattr(logits_process, request["processor"])(**request["arguments"])
        return processor(request["ids"], request["logits"].clone())
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request["folder"], dtype=torch.float32).eval()
    completions = []
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request["max_new_tokens"],
            pad_token_id=0,
            **request["options"],
        )
        completions.append(output[0, ids.size(1) :].tolist())
    return completions


if __name__ == "__main__":
    torch.save([_answer(request) for request in torch.load(sys.argv[1])], sys.argv[2])
