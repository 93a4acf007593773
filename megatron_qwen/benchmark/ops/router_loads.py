"""How unevenly a trained router spreads tokens over experts: makes `router_loads.json`, which MoE cases draw from.

`python -m megatron_qwen.benchmark.ops.router_loads [STEPS]` trains two small mixtures of experts (60 experts, top 4 and
64, top 8, as the released models have; hidden 128, 2 layers, balance loss 0.001 as Qwen's) on the bytes of Python's
standard library, and counts the choices of the second layer's router on text it has not seen: the share of each expert,
sorted. Real models see more balanced or more skewed text; the file says what was trained.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

LOADS_FILE = Path(__file__).with_name("router_loads.json")
SHAPES = {60: 4, 64: 8}
STEPS, BATCH, SEQ_LENGTH, HIDDEN = 40, 4, 128, 128
HELD_OUT = 16


def shares_of_experts(experts: int) -> list[float]:
    """Return the stored shares of a router with so many experts, largest first; of 60, cut or repeated, otherwise."""
    stored = {int(name): shares for name, shares in json.loads(LOADS_FILE.read_text())["shares"].items()}
    shares = stored.get(experts, stored[min(stored)])
    chosen = [shares[index * len(shares) // experts] for index in range(experts)]
    return [each / sum(chosen) for each in chosen]


def batches(seed: int) -> Iterator[torch.Tensor]:
    """Yield bytes of the standard library, int64 [BATCH, SEQ_LENGTH + 1], for ever."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(each.read_bytes() for each in files)), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - SEQ_LENGTH - 1, (BATCH,), generator=generator)
        yield torch.stack([text[start : start + SEQ_LENGTH + 1] for start in starts.tolist()]).long()


def train_and_count(experts: int, topk: int, steps: int) -> tuple[list[float], float]:
    """Return the shares of the last layer's experts, largest first, and the last training loss (nats per byte)."""
    from megatron_qwen.model.build import build_model
    from megatron_qwen.testing.tiny import tiny_moe

    config = tiny_moe(
        layers=2, hidden=HIDDEN, vocab=256, experts=experts, topk=topk, expert_ffn=64, shared_ffn=64 * topk
    )
    model = build_model(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    positions = torch.arange(SEQ_LENGTH).expand(BATCH, -1)
    loss = torch.zeros(())
    for _, text in zip(range(steps), batches(0), strict=False):
        loss = model(text[:, :-1], positions, None, labels=text[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    counts = torch.zeros(experts)
    router = model.decoder.layers[-1].mlp.router

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        logits = torch.nn.functional.linear(inputs[0].flatten(0, 1), router.weight)
        counts.add_(torch.bincount(logits.topk(topk).indices.flatten(), minlength=experts))

    router.register_forward_pre_hook(count)
    with torch.no_grad():
        for _, text in zip(range(HELD_OUT), batches(1), strict=False):
            model(text[:, :-1], positions, None, labels=text[:, 1:])
    return (counts / counts.sum()).sort(descending=True).values.tolist(), float(loss.detach())


def main(steps: int = STEPS) -> None:
    """Train, count and write the file."""
    shares, losses = {}, {}
    for experts, topk in SHAPES.items():
        found, losses[experts] = train_and_count(experts, topk, steps)
        shares[experts] = [round(each, 6) for each in found]
    made = {"made": f"{__spec__.name} {steps}", "loss_nats_per_byte": losses, "shares": shares}
    LOADS_FILE.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main(*(int(each) for each in sys.argv[1:]))
