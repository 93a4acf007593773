"""Compares the files of folders with the sizes and SHA-256 that manifests say they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.checkpoint.manifest import MANIFEST_NAME, FileRecord, hash_files, list_files, read_manifest
from megatron_qwen.conversion.advance import Advance, Progress, silent
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
    places = [place for folder in folders for place in _places(Path(folder))]
    manifests = {place: read_manifest(place) for place in places if (place / MANIFEST_NAME).is_file()}
    if not manifests:
        raise IncompleteInputError(
            f"{', '.join(map(str, folders))}: no {MANIFEST_NAME}, so there is nothing to compare with. Folders written "
            "by megatron-qwen have one; compare the weights themselves with --weights"
        )
    names = {place: list_files(place) for place in places}
    num_bytes = sum((place / name).stat().st_size for place in places for name in names[place])
    with progress("files", sum(map(len, names.values())), num_bytes) as advance:
        found = {place: _hash(place, names[place], threads, advance) for place in places}
    differences: dict[tuple[Path, str, str], FileDifference] = {}
    compared: set[Path] = set()
    for place, files in found.items():
        for origin, records in manifests.items():
            if place == origin or _are_copies(files, records):
                compared.add(place)
                for item in _compare(place, files, origin, records):
                    differences.setdefault((place, item.name, item.kind), item)
    loose = [str(path) for folder in folders for path in _loose_files(Path(folder), compared)]
    hashed = [record for files in found.values() for record in files.values()]
    return ManifestReport(
        manifests=tuple(str(place / MANIFEST_NAME) for place in manifests),
        files=len(hashed),
        num_bytes=sum(record.bytes for record in hashed),
        differences=tuple(differences.values()),
        uncovered=tuple(loose),
    )


def _places(folder: Path) -> list[Path]:
    """Return the folders that a manifest describes, or would."""
    if not folder.is_dir():
        raise IncompleteInputError(f"{folder}: no such folder")
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    return sorted(child.parent for child in folder.glob(f"*/{MANIFEST_NAME}")) or [folder]


def _hash(place: Path, names: list[str], threads: int, advance: Advance) -> dict[str, FileRecord]:
    records: dict[str, FileRecord] = {}
    for begin in range(0, len(names), threads):
        part = hash_files(place, names[begin : begin + threads], threads=threads)
        records |= part
        advance(len(part), sum(record.bytes for record in part.values()))
    return records


def _are_copies(a: Mapping[str, FileRecord], b: Mapping[str, FileRecord]) -> bool:
    return any(name.endswith(_WEIGHT_SUFFIXES) for name in a.keys() & b.keys())


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
