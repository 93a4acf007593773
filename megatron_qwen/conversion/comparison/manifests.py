"""Compares the files of folders with the sizes and SHA-256 that manifests say they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.checkpoint.manifest import MANIFEST_NAME, FileRecord, hash_files, list_files, read_manifest
from megatron_qwen.conversion.comparison.advance import Advance, Progress, silent
from megatron_qwen.errors import IncompleteInputError

_WEIGHT_SUFFIXES = (".safetensors", ".distcp", ".pt")


@dataclass(frozen=True, kw_only=True)
class FileDifference:
    """One file that is not as a manifest says.

    Attributes:
        folder: where the file is, or should be.
        manifest: folder of the manifest it was compared with.
        name: relative to `folder`.
        kind: "missing", "extra" or "changed".
        expected: size and SHA-256 in the manifest; None for an extra file.
        found: size and SHA-256 of the file; None for a missing one.
    """

    folder: str
    manifest: str
    name: str
    kind: str
    expected: FileRecord | None
    found: FileRecord | None


@dataclass(frozen=True, kw_only=True)
class ManifestReport:
    """Outcome: manifests used, `files` and `num_bytes` hashed, what differs, and files that no manifest covers."""

    manifests: tuple[str, ...]
    files: int
    num_bytes: int
    differences: tuple[FileDifference, ...]
    uncovered: tuple[str, ...]

    @property
    def is_equal(self) -> bool:
        """Whether every file is as the manifests say."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "is_equal": self.is_equal}


def compare_manifests(*folders: str | Path, threads: int = 4, progress: Progress = silent) -> ManifestReport:
    """Hash every file of the folders and compare with their manifests.

    A manifest is looked for in the folder itself, and below it in each step's. Two folders that hold a weight file of
    the same name are taken for copies: each is then also compared with the other's manifest.

    Args:
        folders: Hugging Face or Megatron checkpoints.
        threads: that hash.
        progress: of the files and their bytes.

    Raises:
        IncompleteInputError: no folder has a manifest, or one does not exist.
        CorruptInputError: a manifest is damaged.
    """
    roots = [Path(folder) for folder in folders]
    relative = sorted({place for root in roots for place in _places(root)})
    if not relative:
        raise IncompleteInputError(
            f"{', '.join(map(str, folders))}: no {MANIFEST_NAME}, so there is nothing to compare with. Folders written "
            "by megatron-qwen have one; compare the weights themselves with --weights"
        )
    places = list(dict.fromkeys(root / each for root in roots for each in relative if (root / each).is_dir()))
    manifests = {place: read_manifest(place) for place in places if (place / MANIFEST_NAME).is_file()}
    names = {place: list_files(place) for place in places}
    pairs = [
        (root / each, other / each)
        for each in relative
        for root in roots
        for other in roots
        if other / each in manifests and root / each in names
        if root == other or _are_copies(names[root / each], manifests[other / each])
    ]
    compared = {place for place, _ in pairs}
    num_bytes = sum((place / name).stat().st_size for place in compared for name in names[place])
    with progress("files", sum(len(names[place]) for place in compared), num_bytes) as advance:
        found = {place: _hash(place, names[place], threads, advance) for place in places if place in compared}
    differences: dict[tuple[Path, str, str], FileDifference] = {}
    for place, origin in pairs:
        for item in _compare(place, found[place], origin, manifests[origin]):
            differences.setdefault((place, item.name, item.kind), item)
    loose = [str(path) for root in dict.fromkeys(roots) for path in _loose_files(root, compared)]
    hashed = [record for files in found.values() for record in files.values()]
    return ManifestReport(
        manifests=tuple(str(place / MANIFEST_NAME) for place in manifests),
        files=len(hashed),
        num_bytes=sum(record.bytes for record in hashed),
        differences=tuple(differences.values()),
        uncovered=tuple(loose),
    )


def _places(folder: Path) -> list[Path]:
    """Return where manifests lie: in the folder itself or, relative to it, in each step's."""
    if not folder.is_dir():
        raise IncompleteInputError(f"{folder}: no such folder")
    if (folder / MANIFEST_NAME).is_file():
        return [Path()]
    return [manifest.parent.relative_to(folder) for manifest in folder.glob(f"*/{MANIFEST_NAME}")]


def _hash(place: Path, names: list[str], threads: int, advance: Advance) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for begin in range(0, len(names), threads):
        part = hash_files(place, names[begin : begin + threads], threads=threads)
        records |= part
        advance(len(part), sum(record.bytes for record in part.values()))
    return records


def _are_copies(names: list[str], records: Mapping[str, FileRecord]) -> bool:
    return any(name.endswith(_WEIGHT_SUFFIXES) for name in records.keys() & names)


def _compare(
    place: Path, files: Mapping[str, FileRecord], origin: Path, records: Mapping[str, FileRecord]
) -> Iterator[FileDifference]:
    for name in sorted(files.keys() | records.keys()):
        expected, found = records.get(name), files.get(name)
        if expected == found:
            continue
        kind = "missing" if found is None else "extra" if expected is None else "changed"
        yield FileDifference(
            folder=str(place), manifest=str(origin), name=name, kind=kind, expected=expected, found=found
        )


def _loose_files(folder: Path, compared: set[Path]) -> Iterator[Path]:
    for name in list_files(folder):
        path = folder / name
        if not compared & {*path.parents} and path.name != MANIFEST_NAME:
            yield path
