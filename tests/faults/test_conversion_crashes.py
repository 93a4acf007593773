"""Faults 1 and 2: a conversion killed, stopped, interrupted or failing at any registered point, for every verb."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_server import CommandServer
from hostile import Ended, command, contents, require_refusal

from megatron_qwen.errors import INTERRUPTED_EXIT_CODE, IncompleteInputError, StorageError
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf

# In the order in which a conversion comes by; from `commit.renamed` on the new result has its name.
POINTS = (
    "text.drafted",
    "convert.planned",
    "convert.skeleton",
    "convert.piece",
    "convert.file",
    "convert.journal",
    "convert.written",
    "convert.manifest",
    "commit.synced",
    "commit.renamed",
    "convert.renamed",
)
COMPLETE_FROM = POINTS.index("commit.renamed")
# The other families belong to training, where test_checkpoint_faults.py kills ranks at each, and to data sets.
OTHERS = ("save", "retention", "data")
VERBS: dict[str, tuple[str, ...]] = {
    "import": ("convert", "import", "hf"),
    "import to ranks": ("convert", "import", "hf", "--ckpt-format", "torch", "--tp", "2", "--pp", "2"),
    "export": ("convert", "export", "megatron", "--max-shard-size", "100KB"),
    "reshard": ("convert", "reshard", "megatron", "--ckpt-format", "torch", "--tp", "2"),
    "reshard back": ("convert", "reshard", "legacy", "--allow-pickle"),
}


@dataclass(frozen=True)
class Verb:
    """A conversion of a fixed input, and what it makes."""

    arguments: tuple[object, ...]
    whole: dict[str, bytes]
    old: Path

    def to(self, target: Path, *options: str) -> tuple[object, ...]:
        group, name, source, *others = self.arguments
        return (group, name, source, target, *others, "--json", *options)


@pytest.fixture(scope="module")
def inputs(server: CommandServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of one shape in three formats: `*` is converted, `other-*` is what the target held before."""
    folder = tmp_path_factory.mktemp("inputs")
    for seed, prefix in enumerate(("", "other-")):
        write_tiny_hf(folder / f"{prefix}hf", tiny_dense(layers=4, vocab=131), seed=seed)
        for name, options in {"megatron": (), "legacy": ("--ckpt-format", "torch", "--pp", "2")}.items():
            ended = server.run("convert", "import", folder / f"{prefix}hf", folder / f"{prefix}{name}", *options)
            assert ended.code == 0, ended
    return folder


@pytest.fixture(scope="module")
def verbs(server: CommandServer, inputs: Path) -> dict[str, Verb]:
    made = {}
    for number, (name, (group, verb, source, *options)) in enumerate(VERBS.items()):
        for prefix in ("", "other-"):
            target = inputs / f"{prefix}made-{number}"
            ended = server.run(group, verb, inputs / f"{prefix}{source}", target, *options)
            assert ended.code == 0, ended
        whole = contents(inputs / f"made-{number}")
        made[name] = Verb((group, verb, inputs / source, *options), whole, inputs / f"other-made-{number}")
        assert contents(made[name].old) != whole
    return made


def staging_of(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f"{target.name}.incomplete-*"))


def finished_files(target: Path, point: str) -> dict[str, int]:
    """Return the files that a resume has no need to write again, with their inodes."""
    if POINTS.index(point) >= COMPLETE_FROM:
        return {name: (target / name).stat().st_ino for name in contents(target)}
    (staging,) = staging_of(target)
    journal = staging / "progress.json"
    names = json.loads(journal.read_text())["finished"] if journal.exists() else []
    return {name: (staging / "output" / name).stat().st_ino for name in names}


def require_refused_by_all_readers(target: Path) -> None:
    """What lies aside is taken for a checkpoint by none of our readers, however complete it looks."""
    for staging in staging_of(target):
        folders = [staging, *(path for path in staging.rglob("*") if path.is_dir())]
        for folder in folders:
            for arguments in (
                ("convert", "import", folder, target.parent / "x", "--allow-pickle"),
                ("convert", "reshard", folder, target.parent / "x", "--allow-pickle"),
                ("convert", "verify", folder, folder, "--allow-pickle"),
            ):
                assert "half-made output" in require_refusal(command(*arguments), IncompleteInputError)


def require_whole(target: Path, expected: dict[str, bytes]) -> None:
    assert contents(target) == expected


def resume(server: CommandServer, verb: Verb, target: Path, point: str, *options: str) -> Ended:
    """Resume a conversion killed at `point`: it ends equal to an undisturbed one and writes no finished file again."""
    finished = finished_files(target, point)
    ended = server.run(*verb.to(target, "--resume", *options))
    assert ended.code == 0, ended
    require_whole(target, verb.whole)
    assert staging_of(target) == []
    assert {name: (target / name).stat().st_ino for name in finished} == finished, "written again"
    return ended


# Every point with some verb, and every verb at some points; the whole grid is run by `make test-all`. The functions
# behind the commands are killed at all points of two verbs in tests/conversion/test_conversion_resume.py.
SPREAD = ("import", "export", "reshard", "import to ranks", "reshard back")


def grid(points: Iterable[Any], every: Sequence[str] = SPREAD) -> list[Any]:
    """Return (point, verb) cases: one verb per point, in turn, and the others marked as exhaustive."""
    cases = []
    for number, point in enumerate(points):
        for offset in range(len(every)):
            marks = [] if offset == 0 else [pytest.mark.exhaustive]
            name = every[(number + offset) % len(every)]
            cases.append(pytest.param(point, name, marks=marks, id=f"{point}-{name}"))
    return cases


NTH = {"convert.piece": (1, 7), "convert.file": (1, 2), "convert.journal": (1, 2), "text.drafted": (1, 3)}
KILLS = [f"{point}:{nth}" for point in POINTS for nth in NTH.get(point, (1,))]


@pytest.mark.parametrize(("place", "name"), grid(KILLS))
def test_1_killed_conversion_leaves_nothing_or_all_and_resumes_to_the_same_bytes(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path, name: str, place: str
) -> None:
    verb, target = verbs[name], tmp_path / "out"
    point = place.partition(":")[0]
    ended = server.run(*verb.to(target), failpoint=f"{place}:kill")
    assert ended.code == -signal.SIGKILL, ended
    assert os.listdir(tmp_path) != []
    if POINTS.index(point) >= COMPLETE_FROM:
        require_whole(target, verb.whole)
    else:
        assert not target.exists()
    resume(server, verb, target, point)


@pytest.mark.parametrize(("point", "name"), grid(POINTS))
def test_1_killed_overwrite_keeps_the_old_result_or_has_the_new_one(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path, name: str, point: str
) -> None:
    verb, target = verbs[name], tmp_path / "out"
    shutil.copytree(verb.old, target)
    assert server.run(*verb.to(target, "--overwrite"), failpoint=f"{point}:1:kill").code == -signal.SIGKILL
    require_whole(target, verb.whole if POINTS.index(point) >= COMPLETE_FROM else contents(verb.old))
    resume(server, verb, target, point, "--overwrite")


@pytest.mark.parametrize("name", SPREAD[:3])
def test_1_half_made_results_are_taken_for_a_checkpoint_by_no_reader(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path, name: str
) -> None:
    verb, target = verbs[name], tmp_path / "out"
    for point in ("convert.piece:7", "convert.journal:1", "convert.manifest:1"):
        assert server.run(*verb.to(target), failpoint=f"{point}:kill").code == -signal.SIGKILL
    assert len(staging_of(target)) == 3
    require_refused_by_all_readers(target)


def test_1_no_registered_point_is_left_untested(server: CommandServer) -> None:
    registered = server.registered()
    assert [point for point in registered if point.split(".")[0] not in OTHERS] == sorted(POINTS)


@pytest.mark.parametrize(("point", "name"), grid(POINTS))
def test_1_disk_full_at_any_point_is_a_storage_error_and_leaves_what_was_there(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path, name: str, point: str
) -> None:
    verb, target = verbs[name], tmp_path / "out"
    shutil.copytree(verb.old, target)
    ended = server.run(*verb.to(target, "--overwrite"), failpoint=f"{point}:1:enospc")
    assert ended.code == StorageError.exit_code, ended
    assert "No space left on device" in ended.err
    assert "Traceback" not in ended.err
    require_whole(target, verb.whole if POINTS.index(point) >= COMPLETE_FROM else contents(verb.old))
    assert staging_of(target) == []


@pytest.mark.parametrize("point", POINTS)
def test_1_an_error_of_ours_at_any_point_leaves_nothing_aside(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path, point: str
) -> None:
    verb, target = verbs["export"], tmp_path / "out"
    ended = server.run(*verb.to(target), failpoint=f"{point}:1:raise")
    assert ended.code == 1, ended
    assert f"FailPointError: fail point {point}" in ended.err
    assert staging_of(target) == []
    assert target.exists() == (POINTS.index(point) >= COMPLETE_FROM)
    if target.exists():
        require_whole(target, verb.whole)


STOPPABLE = ("convert.planned", "convert.skeleton", "convert.piece", "convert.file", "convert.journal")


def signals_in_turn() -> list[Any]:
    """Return (point, verb, signal) cases: every point and verb with one of the signals, the others exhaustive."""
    cases = []
    for number, case in enumerate(grid(STOPPABLE)):
        # Five verbs per point, so that the signal alternates over the first verbs of the points.
        for offset, sent in enumerate((signal.SIGINT, signal.SIGTERM)):
            marks = case.marks if offset == number % 2 else [pytest.mark.exhaustive]
            cases.append(pytest.param(*case.values, sent, marks=marks, id=f"{case.id}-{sent.name}"))
    return cases


@pytest.mark.parametrize(("point", "name", "number"), signals_in_turn())
def test_2_interrupted_conversion_ends_with_130_and_resumes(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path, name: str, number: int, point: str
) -> None:
    verb, target = verbs[name], tmp_path / "out"
    process = server.start(*verb.to(target), failpoint=f"{point}:1:stop")
    process.wait_until_stopped()
    process.signal(number)
    process.signal(signal.SIGCONT)
    ended = process.wait()
    assert ended.code == INTERRUPTED_EXIT_CODE, ended
    assert "Traceback" not in ended.err
    assert "--resume" in ended.err
    assert not target.exists()
    if point in STOPPABLE[:2]:  # later another thread may be in the last file already
        assert len(finished_files(target, point)) < len(verb.whole) - 1, "it went on to the end"
    resume(server, verb, target, point)


@pytest.mark.parametrize("name", ["import", "export"])
def test_2_stopped_process_goes_on_where_it_was(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path, name: str
) -> None:
    verb, target = verbs[name], tmp_path / "out"
    process = server.start(*verb.to(target), failpoint="convert.piece:3:stop")
    process.wait_until_stopped()
    assert not target.exists()
    process.signal(signal.SIGCONT)
    assert process.wait().code == 0
    require_whole(target, verb.whole)


def test_2_a_second_process_does_not_take_over_a_folder_that_is_being_written(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path
) -> None:
    verb, target = verbs["import"], tmp_path / "out"
    first = server.start(*verb.to(target), failpoint="convert.piece:3:stop")
    first.wait_until_stopped()
    second = server.run(*verb.to(target, "--resume"))
    assert second.code == 0, second
    assert "another process is writing it" in second.err
    require_whole(target, verb.whole)
    first.signal(signal.SIGCONT)
    ended = first.wait()
    assert ended.code == StorageError.exit_code, ended
    assert "exists already" in ended.err
    require_whole(target, verb.whole)
    assert staging_of(target) == []


def test_1_doctor_lists_what_was_left_with_age_size_and_the_command_to_go_on(
    server: CommandServer, verbs: dict[str, Verb], tmp_path: Path
) -> None:
    verb, target = verbs["export"], tmp_path / "here" / "out"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "iter_0000010.incomplete-ab12").mkdir()
    (elsewhere / "notes.incomplete-cd34").write_bytes(bytes(10**6))
    assert server.run(*verb.to(target), failpoint="convert.journal:1:kill").code == -signal.SIGKILL
    at_work = server.start(*verb.to(tmp_path / "here" / "busy"), failpoint="convert.piece:2:stop")
    at_work.wait_until_stopped()

    ended = command("doctor", target.parent, "--stale", elsewhere, "--json")
    found = {Path(item["path"]).name.partition(".")[0]: item for item in ended.report["leftovers"]}
    assert set(found) == {"out", "busy", "iter_0000010", "notes"}
    assert found["busy"]["is_in_use"]
    assert "leave it alone" in found["busy"]["advice"]
    assert "the next run" in found["iter_0000010"]["advice"]
    assert found["notes"]["num_bytes"] >= 10**6
    assert found["notes"]["advice"] == f"rm -r {elsewhere / 'notes.incomplete-cd34'}"
    assert 0 <= found["out"]["age_seconds"] < 600
    assert found["out"]["num_bytes"] > 10_000
    (_, _, source, *options) = verb.arguments
    going_on = f"megatron-qwen convert export {source}/release {target} --resume"
    assert found["out"]["advice"].startswith(going_on)

    at_work.signal(signal.SIGKILL)
    at_work.wait()
    shown = command("doctor", target.parent, "--stale", elsewhere).out
    assert "half-written outputs" in shown
    words = going_on.split()[1:]
    assert server.run(*words, *map(str, options), "--json").report["reused_files"] >= 1
    require_whole(target, verb.whole)
