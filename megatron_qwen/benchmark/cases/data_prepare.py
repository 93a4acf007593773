"""`data prepare` against the tokenizers library alone, as a report; the timing is `data.bench`'s."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from megatron_qwen.benchmark.report import Report, Row, git_commit, now
from megatron_qwen.benchmark.timing import summarise
from megatron_qwen.data.bench import benchmark_prepare
from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.device import device_name


def measure_data(sources: Sequence[Path], tokenizer: Path, *, workers: int, repeats: int) -> Report:
    """Encode `sources` in turn with `prepare` (everything it does) and with bare `encode_batch`.

    Args:
        sources: files or folders, as `data prepare` takes them.
        tokenizer: folder or file.
        workers: processes of each.
        repeats: times of each.

    Raises:
        ConfigError: repeats below 1.
        QwenError: what `prepare` raises.
    """
    if repeats < 1:
        raise ConfigError(f"--steps: got {repeats}, expected at least 1")
    found = benchmark_prepare(list(sources), QwenTokenizer.load(tokenizer), workers=workers, repeats=repeats)
    ours = summarise(found.prepare_seconds)
    rows = []
    for name, seconds in (("megatron_qwen", ours), ("tokenizers", summarise(found.bare_seconds))):
        rows.append(
            Row(
                case="data",
                contestant=name,
                setting={"text_bytes": found.text_bytes, "workers": workers},
                seconds=seconds,
                ratio=ours.median / seconds.median,
                unit="tokens",
                amount_per_second=found.tokens / seconds.median,
                flops_per_second=0.0,
                utilisation=0.0,
                peak_bytes=0,
                versions={"python": sys.version.split()[0], "tokenizers": metadata.version("tokenizers")},
            )
        )
    return Report(device=device_name(), commit=git_commit(), taken=now(), agreement=0.0, rows=tuple(rows))
