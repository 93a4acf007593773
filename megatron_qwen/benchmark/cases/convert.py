"""`bench convert`: our conversions, a copy with SHA-256 as the ceiling and `transformers` as the peer, in turn.

Each conversion runs in a fresh process, so that peak memory is its own and so that nothing is warm but the page cache.
What is exported is what the same round imported, and each exported folder is compared with the source bit for bit
before a figure counts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_qwen.benchmark.cases.convert_folders import (
    folder_bytes,
    has_room,
    largest_tensor_bytes,
    require_equal_tensors,
    require_room,
    settle,
    write_shaped_hf,
)
from megatron_qwen.benchmark.cases.convert_report import ConversionBenchmark, ConversionRow
from megatron_qwen.benchmark.cases.model_folder import find_config
from megatron_qwen.benchmark.registry import find_case
from megatron_qwen.benchmark.report import git_commit, now
from megatron_qwen.benchmark.timing import percentile, summarise
from megatron_qwen.benchmark.worker import Worker
from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.device import device_name

HF, TORCH_DIST, PER_RANK = "hf", "torch_dist", "torch"
COPY, SYNCED_COPY, DRY_RUN = "copy", "copy+fsync", "import --dry-run"
LARGE_MODEL = "qwen2.5-3b"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One line of the table.

    Attributes:
        name: as shown.
        contestant: of the registry.
        reads, makes: kinds of folder; what reads one takes the first that was made in the round.
        arguments: for the contestant's factory.
        has_rate_bar: whether its rate is held to the copy's.
    """

    name: str
    contestant: str
    reads: str
    makes: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    has_rate_bar: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is a conversion of this project, whose memory is held to the bar."""
        return self.contestant == "megatron_qwen"


def _pair(suffix: str, kind: str, *, has_rate_bar: bool = False, **arguments: Any) -> tuple[Entrant, Entrant]:
    options: dict[str, Any] = {"contestant": "megatron_qwen", "has_rate_bar": has_rate_bar}
    return (
        Entrant(
            name=f"import{suffix}", reads=HF, makes=kind, arguments={"direction": "import", **arguments}, **options
        ),
        Entrant(
            name=f"export{suffix}", reads=kind, makes=HF, arguments={"direction": "export", **arguments}, **options
        ),
    )


PLAIN = _pair("", TORCH_DIST, has_rate_bar=True)
VERIFIED = _pair(" --verify", TORCH_DIST, verify=True)
LEGACY = _pair(" TP2xPP2", PER_RANK, layout=(2, 2))
CEILINGS = (
    Entrant(name=COPY, contestant=COPY, reads=HF, makes=HF, arguments={"fsync": False}),
    Entrant(name=SYNCED_COPY, contestant=COPY, reads=HF, makes=HF, arguments={"fsync": True}),
)
PEERS = (Entrant(name="transformers", contestant="transformers", reads=HF, makes=HF),)
PLANNED = (Entrant(name=DRY_RUN, contestant="dry-run", reads=HF, makes=TORCH_DIST),)


@dataclass(frozen=True, kw_only=True)
class ConvertBench:
    """What to measure.

    Attributes:
        source: Hugging Face folder; None generates one of `model`.
        model: name for `find_config`; used where `source` is None.
        layers: of the generated model; None for all.
        rounds: conversions by each entrant.
        threads: that our conversions write with; None for their own choice.
        legacy: convert to and from per-rank files, TP 2 by PP 2, too.
        large: also a generated checkpoint of the 3B shape (6.2 GB), without peer.
        dry_run_model: of the sparse checkpoint that is only planned.
        only: names of entrants; empty for all.
        scratch: existing folder on the disk to measure; None for that of temporary files.

    Raises:
        ConfigError: a value is out of range, or not exactly one of `source` and `model` is given.
    """

    source: Path | None = None
    model: str | None = None
    layers: int | None = None
    rounds: int = 3
    threads: int | None = None
    legacy: bool = False
    large: bool = False
    dry_run_model: str = "qwen2.5-14b"
    only: tuple[str, ...] = ()
    scratch: Path | None = None

    def __post_init__(self) -> None:
        if (self.source is None) == (self.model is None):
            raise ConfigError("give a Hugging Face folder, or --model with a name to generate one, and not both")
        if self.source is not None and self.layers is not None:
            raise ConfigError("--layers: a folder is converted whole; it goes with --model")
        for name, value in (("--rounds", self.rounds), ("--threads", 1 if self.threads is None else self.threads)):
            if value < 1:
                raise ConfigError(f"{name}: got {value}, expected at least 1")
        if self.scratch is not None and not self.scratch.is_dir():
            raise ConfigError(f"--scratch: {self.scratch} is no folder")
        names = [entrant.name for entrant in self._all()]
        for name in self.only:
            if name not in names:
                raise ConfigError(f"--only {name!r}: expected one of {names}" + " or --legacy" * (not self.legacy))
        chosen = self._chosen(self._all())
        made = {HF, *(entrant.makes for entrant in chosen if entrant.name != DRY_RUN)}
        for entrant in chosen:
            if entrant.reads not in made:
                raise ConfigError(f"--only {entrant.name!r}: nothing makes what it reads; add the import")

    def run(self, advance: Callable[[str], None] = lambda what: None) -> ConversionBenchmark:
        """Measure everything.

        Args:
            advance: told what begins.

        Raises:
            StorageError: the disk has no room; said before anything is written.
            MismatchError: a round trip changed a bit.
            RankFailure: a contestant died; the message ends with its output.
        """
        load = os.getloadavg()[0]
        with TemporaryDirectory(prefix="qwen-bench-convert-", dir=self.scratch) as scratch:
            rows, notes = self._dry_run(Path(scratch), advance)
            rows = [*self._main(Path(scratch), advance), *rows, *self._large(Path(scratch), advance)]
        setting = {
            "rounds": self.rounds,
            "threads": self.threads or "default",
            "cores": len(os.sched_getaffinity(0)),
            "load": f"{load:.1f} .. {os.getloadavg()[0]:.1f}",
        }
        return ConversionBenchmark(
            device=device_name(), commit=git_commit(), taken=now(), setting=setting, notes=notes, rows=tuple(rows)
        )

    def num_steps(self) -> int:
        """Return how often `run` tells `advance` that something begins, at most."""
        lines = len(self._chosen(self._all())) + len(self._chosen(PLAIN + VERIFIED + CEILINGS)) * self.large
        return lines * self.rounds + self.large + (self.source is None)

    def _all(self) -> tuple[Entrant, ...]:
        return (*PLAIN, *VERIFIED, *(LEGACY if self.legacy else ()), *CEILINGS, *PEERS, *PLANNED)

    def _chosen(self, entrants: Iterable[Entrant]) -> tuple[Entrant, ...]:
        chosen = [each for each in entrants if not self.only or each.name in self.only]
        if self.threads is None:
            return tuple(chosen)
        threads = {"threads": self.threads}
        return tuple(
            replace(each, arguments={**each.arguments, **threads}) if each.is_ours else each for each in chosen
        )

    def _dry_run(self, scratch: Path, advance: Callable[[str], None]) -> tuple[list[ConversionRow], tuple[str, ...]]:
        if not self._chosen(PLANNED):
            return [], ()
        source = scratch / "sparse"
        write_shaped_hf(source, find_config(self.dry_run_model, layers=None, seq_length=1), is_sparse=True)
        num_bytes = folder_bytes(source)
        if not has_room(scratch, num_bytes):
            # The plan proves that the disk has room, so it cannot be made here.
            return [], (f"{DRY_RUN} of {self.dry_run_model}: left out, {num_bytes:,} bytes are not free on the disk",)
        rows = measure(self.dry_run_model + " (sparse)", source, PLANNED, self.rounds, scratch, advance)
        shutil.rmtree(source)
        return rows, ()

    def _main(self, scratch: Path, advance: Callable[[str], None]) -> list[ConversionRow]:
        entrants = self._chosen(each for each in self._all() if each.name != DRY_RUN)
        if self.source is None:
            assert self.model is not None
            return self._generated(self.model, self.layers, entrants, scratch, advance)
        require_room(scratch, 2 * folder_bytes(self.source), "converting there and back")
        return measure(self.source.resolve().name, self.source, entrants, self.rounds, scratch, advance)

    def _large(self, scratch: Path, advance: Callable[[str], None]) -> list[ConversionRow]:
        if not self.large:
            return []
        return self._generated(LARGE_MODEL, None, self._chosen(PLAIN + VERIFIED + CEILINGS), scratch, advance)

    def _generated(
        self,
        model: str,
        layers: int | None,
        entrants: Sequence[Entrant],
        scratch: Path,
        advance: Callable[[str], None],
    ) -> list[ConversionRow]:
        config, source = find_config(model, layers=layers, seq_length=1), scratch / "generated"
        advance(f"generating {model}")
        write_shaped_hf(source, config, is_sparse=True)
        require_room(scratch, 3 * folder_bytes(source), f"generating {model} and converting it there and back")
        write_shaped_hf(source, config)
        name = f"{model} ({config.num_hidden_layers} layers, generated)"
        rows = measure(name, source, entrants, self.rounds, scratch, advance)
        shutil.rmtree(source)
        return rows


@dataclass(frozen=True, kw_only=True)
class _Sample:
    seconds: float
    cpu_seconds: float
    value: float
    start_seconds: float
    interpreter_bytes: int
    peak_bytes: int
    versions: Mapping[str, str]


def measure(
    checkpoint: str,
    source: Path,
    entrants: Sequence[Entrant],
    rounds: int,
    scratch: Path,
    advance: Callable[[str], None],
) -> list[ConversionRow]:
    """Let every entrant convert `source` once per round, in turn.

    Args:
        checkpoint: name for the rows.
        source: Hugging Face folder.
        entrants: in their order; one that reads a Megatron folder comes after one that makes it.
        rounds: at least 1.
        scratch: existing folder for what they make; empty of it again at the end.
        advance: told what begins.

    Raises:
        MismatchError: a folder that an entrant made holds other bits than `source`.
        RankFailure: a contestant died.
    """
    samples: dict[str, list[_Sample]] = {entrant.name: [] for entrant in entrants}
    for number in range(rounds):
        folders = {HF: source}
        for position, entrant in enumerate(entrants):
            advance(f"{checkpoint}: {entrant.name}, round {number + 1} of {rounds}")
            target = scratch / "made" / str(position)
            target.parent.mkdir(exist_ok=True)
            samples[entrant.name].append(_convert(entrant, folders[entrant.reads], target))
            if entrant.makes == HF:
                require_equal_tensors(source, target, entrant.name)
            folders.setdefault(entrant.makes, target)
            later = {each.reads for each in entrants[position + 1 :]}
            folders = {kind: path for kind, path in folders.items() if kind in later or kind == HF}
            _delete_all_but(folders.values(), scratch / "made")
    return [_row(checkpoint, source, entrant, samples) for entrant in entrants]


def _delete_all_but(kept: Iterable[Path], parent: Path) -> None:
    for path in set(parent.iterdir()) - set(kept):
        shutil.rmtree(path)


def _convert(entrant: Entrant, source: Path, target: Path) -> _Sample:
    factories = {each.name: each.factory for each in find_case("convert").contestants}
    arguments = {"source": str(source), "target": str(target), **entrant.arguments}
    with Worker(entrant.name, factories[entrant.contestant], arguments) as worker:
        settle(source)
        step = worker.step()
        return _Sample(
            seconds=step.seconds,
            cpu_seconds=step.cpu_seconds,
            value=step.value,
            start_seconds=worker.start_seconds,
            interpreter_bytes=worker.start_bytes,
            peak_bytes=worker.peak_bytes() - worker.start_bytes,
            versions=worker.versions,
        )


def _row(checkpoint: str, source: Path, entrant: Entrant, samples: Mapping[str, Sequence[_Sample]]) -> ConversionRow:
    mine = samples[entrant.name]
    is_copied = entrant.name != DRY_RUN
    num_bytes = folder_bytes(source)
    return ConversionRow(
        checkpoint=checkpoint,
        contestant=entrant.name,
        seconds=summarise([sample.seconds for sample in mine]),
        cpu_seconds=percentile([sample.cpu_seconds for sample in mine], 0.5),
        verify_seconds=percentile([sample.value for sample in mine], 0.5) if entrant.is_ours else 0.0,
        start_seconds=percentile([sample.start_seconds for sample in mine], 0.5),
        checkpoint_bytes=num_bytes,
        copied_bytes=num_bytes if is_copied else 0,
        copy_fraction=_fraction(samples, entrant, COPY),
        synced_copy_fraction=_fraction(samples, entrant, SYNCED_COPY),
        peak_bytes=max(sample.peak_bytes for sample in mine),
        interpreter_bytes=max(sample.interpreter_bytes for sample in mine),
        largest_tensor_bytes=largest_tensor_bytes(source),
        has_rate_bar=entrant.has_rate_bar,
        has_memory_bar=entrant.is_ours or not is_copied,
        versions=mine[0].versions,
    )


def _fraction(samples: Mapping[str, Sequence[_Sample]], entrant: Entrant, ceiling: str) -> float:
    """Return the median over the rounds of the entrant's rate over the ceiling's; 0 where there is none."""
    if ceiling not in samples or entrant.name == ceiling:
        return 0.0
    pairs = zip(samples[ceiling], samples[entrant.name], strict=True)
    return percentile([limit.seconds / mine.seconds for limit, mine in pairs], 0.5)
