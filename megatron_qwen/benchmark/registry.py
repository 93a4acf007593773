"""The benchmark cases, as data: what is measured, and who takes part.

A later benchmark is one more entry here and one file in `cases/` with the factories it names.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from megatron_qwen.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One side of a comparison.

    Attributes:
        name: as shown in reports and chosen by `--vs`.
        factory: `package.module:function`, called in a process of its own with the case's arguments;
            returns a `worker.Runner`.
        is_ceiling: not a peer but a limit of the machine (a bare GEMM, a copy), left out of the agreement check.
    """

    name: str
    factory: str
    is_ceiling: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing that is measured.

    Attributes:
        name: as typed after `megatron-qwen bench`.
        unit: what `Runner.amount` counts.
        contestants: ours first.
        tolerance: relative difference of the check values, per dtype, above which no speed is reported.
    """

    name: str
    unit: str
    contestants: tuple[Contestant, ...]
    tolerance: dict[str, float]


_CASES = "megatron_qwen.benchmark.cases"

CASES = (
    Case(
        name="train",
        unit="tokens",
        contestants=(
            Contestant(name="megatron_qwen", factory=f"{_CASES}.train_step:MegatronStep"),
            Contestant(name="megatron_qwen-logits", factory=f"{_CASES}.train_step:MegatronLogitsStep"),
            Contestant(name="megatron_qwen-fused", factory=f"{_CASES}.train_step:MegatronFusedStep"),
            Contestant(name="transformers", factory=f"{_CASES}.train_step:TransformersStep"),
            Contestant(name="transformers-bf16", factory=f"{_CASES}.train_step:TransformersPureStep"),
            Contestant(name="gemm", factory=f"{_CASES}.gemm:Gemm", is_ceiling=True),
        ),
        # Losses of the same weights on the same tokens.
        tolerance={"fp32": 1e-4, "bf16": 2e-2},
    ),
    Case(
        name="moe",
        unit="tokens",
        contestants=(
            Contestant(name="megatron_qwen", factory=f"{_CASES}.moe_layer:OurLayer"),
            Contestant(name="megatron-core", factory=f"{_CASES}.moe_layer:MegatronLayer"),
            Contestant(name="transformers", factory=f"{_CASES}.moe_layer:TransformersLayer"),
            Contestant(name="transformers-loop", factory=f"{_CASES}.moe_layer:TransformersLoopLayer"),
        ),
        # Norms of the output and of all gradients. A token between two experts may take either in 16 bits.
        tolerance={"fp32": 1e-4, "bf16": 2e-2},
    ),
    # What they do differs by arguments, and they agree bit for bit: see `cases/convert.py`.
    Case(
        name="convert",
        unit="bytes",
        contestants=(
            Contestant(name="megatron_qwen", factory=f"{_CASES}.convert_contestants:Convert"),
            Contestant(name="dry-run", factory=f"{_CASES}.convert_contestants:DryRun"),
            Contestant(name="transformers", factory=f"{_CASES}.convert_contestants:TransformersSave"),
            Contestant(name="copy", factory=f"{_CASES}.convert_contestants:Copy", is_ceiling=True),
        ),
        tolerance={},
    ),
)


def find_case(name: str) -> Case:
    """Return the case called `name`.

    Raises:
        ConfigError: there is none.
    """
    for case in CASES:
        if case.name == name:
            return case
    names = [case.name for case in CASES]
    near = difflib.get_close_matches(name, names, n=1)
    raise ConfigError(f"benchmark {name!r}: expected one of {names}" + (f"; did you mean {near[0]!r}?" if near else ""))


def choose(case: Case, versus: tuple[str, ...]) -> tuple[Contestant, ...]:
    """Return our contestant, those named in `versus`, and the case's ceilings.

    Raises:
        ConfigError: `versus` names nobody of this case.
    """
    peers = {each.name: each for each in case.contestants[1:] if not each.is_ceiling}
    for name in versus:
        if name not in peers:
            raise ConfigError(f"--vs {name!r}: case {case.name!r} has {sorted(peers)}")
    ceilings = tuple(each for each in case.contestants if each.is_ceiling)
    return (case.contestants[0], *(peers[name] for name in versus), *ceilings)
