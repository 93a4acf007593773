"""Faults 11 and 21 to 24: flipped bits, impossible layouts, full disks, targets in the way, inputs that change."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_server import CommandServer
from hostile import command, contents, edit_weights, exporting, importing, opens, refused, require_refusal, tree

from megatron_qwen.checkpoint.manifest import read_manifest
from megatron_qwen.errors import ConfigError, CorruptInputError, StorageError

FORMATS = ("hf", "megatron", "legacy")


@pytest.fixture
def sources(templates: Path, megatron_template: Path, legacy_template: Path, tmp_path: Path) -> dict[str, Path]:
    """The same model in each format, copies that a test may damage."""
    named = {"hf": templates / "sharded", "megatron": megatron_template, "legacy": legacy_template}
    return {name: Path(shutil.copytree(path, tmp_path / "sources" / name)) for name, path in named.items()}


def converting(source: Path, target: Path) -> tuple[object, ...]:
    verb = "import" if (source / "config.json").exists() else "export"
    return "convert", verb, source, target, "--allow-pickle", "--json"


def weight_file(source: Path) -> Path:
    """Return the largest file of a checkpoint."""
    return max((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) * 3 // 4] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("name", FORMATS)
def test_11_flipped_bit_is_found_by_the_manifest_and_both_digests_are_named(
    sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = sources[name]
    if name == "hf":
        folder = tmp_path / "exported"
        assert command("convert", "export", sources["megatron"], folder).code == 0
    assert command("convert", "verify", folder, "--manifest").code == 0
    file = weight_file(folder)
    place = folder if name == "hf" else folder / "release"
    digest = read_manifest(place)[str(file.relative_to(place))].sha256
    flip(file)
    ended = command("convert", "verify", folder, "--manifest", "--json")
    assert ended.code == CorruptInputError.exit_code
    (difference,) = ended.report["manifest"]["differences"]
    assert (difference["kind"], difference["name"]) == ("changed", str(file.relative_to(place)))
    assert difference["expected"]["sha256"] == digest
    assert len(difference["found"]["sha256"]) == 64
    assert difference["found"]["sha256"] != digest
    shown = command("convert", "verify", folder, "--manifest").out.replace("\n", "")
    assert digest[:12] in shown
    assert difference["found"]["sha256"][:12] in shown


@pytest.mark.parametrize("name", FORMATS)
def test_11_without_a_manifest_the_log_says_that_nothing_verifies_the_content(
    sources: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    for manifest in sources[name].rglob("manifest.json"):
        manifest.unlink()
    caplog.set_level("INFO")
    assert command(*converting(sources[name], tmp_path / "out")).code == 0
    lines = [record.message for record in caplog.records if "not verified against digests" in record.message]
    assert len(lines) == 1, lines
    assert str(sources[name]) in lines[0]


@pytest.mark.parametrize("name", ["megatron", "legacy"])
def test_11_file_of_another_size_than_in_the_manifest_is_refused(
    sources: dict[str, Path], tmp_path: Path, name: str
) -> None:
    file = weight_file(sources[name])
    with file.open("ab") as stream:
        stream.write(b"\0")
    message = refused(CorruptInputError, *converting(sources[name], tmp_path / "out"), within=tmp_path)
    assert f"{file.stat().st_size} bytes, the manifest says {file.stat().st_size - 1}" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--tp", 3), ["tp"]),
        (("--tp", 8), ["tp"]),
        (("--pp", 3), ["pp"]),
        (("--pp", 2, "--pp-layout", "1,2"), ["layout"]),
        (("--ep", 2), ["ep"]),
        (("--pp", 2, "--vpp", 2), ["vpp"]),
        (("--tp", 0), ["tp"]),
        (("--tp", 3, "--pp", 3, "--ep", 5), ["5 problems", "tp=3", "pp*vpp", "ep=5"]),
    ],
)
def test_21_layout_that_does_not_divide_is_refused_with_all_violations(
    single: Path, tmp_path: Path, options: tuple[object, ...], expected: list[str]
) -> None:
    arguments = (*importing(single), "--ckpt-format", "torch", *options)
    with opens() as seen:
        message = refused(ConfigError, *arguments, within=tmp_path)
    assert all(word in message for word in expected), message
    assert tree(tmp_path / "out") == {}
    assert sum(path.endswith(".safetensors") for path in seen) <= 1, "more than headers was read"


def run_with_limit(server: CommandServer, source: Path, target: Path, *options: str, limit: int) -> None:
    ended = server.run(*converting(source, target), *options, file_limit=limit)
    assert ended.code == StorageError.exit_code, ended
    assert "File too large" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("limit", [1000, 100_000])
@pytest.mark.parametrize("name", FORMATS)
def test_22_file_that_cannot_grow_leaves_the_old_output_whole(
    server: CommandServer, sources: dict[str, Path], tmp_path: Path, name: str, limit: int
) -> None:
    """RLIMIT_FSIZE stands for the full disk: at 1000 bytes the journal fails, at 100,000 the weights do."""
    target = tmp_path / "out"
    edit_weights(sources["hf"] / "model-00001-of-00003.safetensors", lambda state: next(iter(state.values())).add_(1))
    assert command("convert", "import", sources["hf"], target).code == 0
    old = contents(target)
    run_with_limit(server, sources[name], target, "--overwrite", limit=limit)
    run_with_limit(server, sources[name], tmp_path / "new", limit=limit)
    assert contents(target) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sources"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 10 MB, of which a conversion wants 8 MB to be free. Without root, the tests above stand alone."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root; RLIMIT_FSIZE stood for the full disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError:
                continue
    return filler


def test_22_conversion_larger_than_the_disk_is_refused_before_it_begins(disk: Path, single: Path) -> None:
    (disk / "taken").write_bytes(bytes(5 * 10**6))
    before = tree(disk)
    message = require_refusal(command("convert", "import", single, disk / "out"), StorageError)
    assert "are free on that disk" in message
    assert tree(disk) == before
    assert command("convert", "import", single, disk / "out", "--dry-run").code == StorageError.exit_code


@pytest.mark.parametrize(
    ("point", "name"),
    [
        ("convert.planned", "hf"),
        ("convert.skeleton", "megatron"),
        ("convert.piece", "hf"),
        ("convert.piece", "legacy"),
        ("convert.written", "megatron"),
    ],
)
def test_22_disk_that_fills_up_at_any_time_leaves_nothing(
    server: CommandServer, disk: Path, sources: dict[str, Path], name: str, point: str
) -> None:
    process = server.start(*converting(sources[name], disk / "out"), "--threads", "1", failpoint=f"{point}:1:stop")
    process.wait_until_stopped()
    filler = fill(disk)
    process.signal(signal.SIGCONT)
    ended = process.wait()
    assert ended.code == StorageError.exit_code, ended
    assert "No space left on device" in ended.err
    assert os.listdir(disk) == [filler.name]
    filler.unlink()
    assert server.run(*converting(sources[name], disk / "out")).code == 0


WAYS: dict[str, Callable[[Path], Path]] = {
    "a file": lambda folder: folder / "file",
    "below a file": lambda folder: folder / "file" / "out",
    "far below a file": lambda folder: folder / "file" / "a" / "b",
    "name too long": lambda folder: folder / ("x" * 300),
    "name too long for its staging folder": lambda folder: folder / ("x" * 250),
    "path too long": lambda folder: folder.joinpath(*["x" * 200] * 30),
    "no file system for files": lambda _: Path("/proc/out"),
    "not empty": lambda folder: folder / "full",
    "a pipe": lambda folder: folder / "pipe",
    "dangling link": lambda folder: folder / "dangling",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verb", [importing, exporting])
def test_23_unusable_target_is_refused_before_weights_are_read(
    single: Path, megatron: Path, tmp_path: Path, verb: Callable[[Path], tuple[object, ...]], way: str
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    name, action, source, _, *others = verb(single if verb is importing else megatron)
    arguments = (name, action, source, WAYS[way](tmp_path), *others)
    message = refused(StorageError, *arguments, within=tmp_path)
    assert str(WAYS[way](tmp_path)) in message
    assert (tmp_path / "file").read_text() == "x"


def test_23_overwriting_is_asked_for_and_never_takes_training_steps(single: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "iter_0000010").mkdir(parents=True)
    assert "--overwrite" in refused(StorageError, *importing(single), within=tmp_path)
    assert "training steps" in refused(StorageError, *importing(single), "--overwrite", within=tmp_path)
    (target / "iter_0000010").rename(target / "notes")
    assert command(*importing(single), "--overwrite").code == 0
    assert not (target / "notes").exists()
    assert sorted(os.listdir(tmp_path)) == ["hf", "out"]


@pytest.mark.parametrize("where", ["itself", "above", "a link to it"])
def test_23_overwriting_never_takes_the_input(single: Path, tmp_path: Path, where: str) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    single = single.rename(folder / "hf")
    (folder / "link").symlink_to("hf")
    target = {"itself": single, "above": folder, "a link to it": folder / "link"}[where]
    message = refused(StorageError, "convert", "import", single, target, "--overwrite", within=tmp_path)
    assert str(single) in message
    assert (single / "model.safetensors").is_file()


def test_23_output_goes_to_another_device(single: Path) -> None:
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == single.stat().st_dev:
        other = Path.home()
    target = other / f"megatron-qwen-test-{os.getpid()}"
    try:
        assert command("convert", "import", single, target).code == 0
        assert command("convert", "verify", single, target).code == 0
        assert not list(other.glob(f"{target.name}.incomplete-*"))
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_23_output_goes_through_a_link_to_where_it_leads(single: Path, tmp_path: Path) -> None:
    (tmp_path / "big" / "disk").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "big" / "disk")
    assert command(*importing(single)).code == 0
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "big" / "disk" / "release").is_dir()
    assert command(*importing(single), "--overwrite").code == 0
    assert (tmp_path / "out").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["big", "hf", "out"]
    assert os.listdir(tmp_path / "big") == ["disk"]


def test_23_dangling_link_in_the_input_is_no_traceback(single: Path, tmp_path: Path) -> None:
    (single / "README.md").symlink_to(tmp_path / "nowhere")
    assert command(*importing(single)).code == 0


def replaced(file: Path) -> None:
    """Another file of the same name, size and time, as a tool that writes aside and renames leaves it."""
    status = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.rename(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "written to": flip,
    "touched": lambda file: os.utime(file),
    "grown": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "truncated": lambda file: os.truncate(file, 100),
    "replaced": replaced,
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("change", CHANGES)
def test_24_input_that_changes_while_it_is_read_is_refused(
    server: CommandServer, sources: dict[str, Path], tmp_path: Path, name: str, change: str
) -> None:
    target = tmp_path / "out"
    arguments = (*converting(sources[name], target), "--threads", "1")
    process = server.start(*arguments, failpoint="convert.piece:2:stop")
    process.wait_until_stopped()
    file = weight_file(sources[name])
    CHANGES[change](file)
    process.signal(signal.SIGCONT)
    ended = process.wait()
    assert ended.code == CorruptInputError.exit_code, ended
    assert "Traceback" not in ended.err
    assert file.name in ended.err
    assert os.listdir(tmp_path) == ["sources"]
