"""A conversion killed at any moment leaves the old result or none, and `--resume` ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_qwen.checkpoint.atomic import stale_staging
from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.conversion.engine.staging import JOURNAL_NAME, OUTPUT_NAME, Journal
from megatron_qwen.conversion.report import ConversionReport
from megatron_qwen.conversion.run import reshard
from megatron_qwen.errors import NumericsError, StorageError
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing import failpoints
from megatron_qwen.testing.forked import run_forked
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf

# name -> how often it is reached at least
POINTS = {
    "convert.planned": 1,
    "convert.skeleton": 3,
    "convert.piece": 20,
    "convert.file": 2,
    "convert.journal": 2,
    "convert.written": 1,
    "convert.manifest": 1,
    "convert.renamed": 1,
    "commit.synced": 1,
    "commit.renamed": 1,
    "text.drafted": 4,
}
RENAMED = ("convert.renamed", "commit.renamed")
ARMED = [f"{name}:{nth}" for name, most in POINTS.items() for nth in sorted({1, most})]
# The engine is the same for every verb; those behind the first two only have to go through it.
FEW = ["convert.piece:20", "convert.journal:1", "convert.manifest:1", "convert.renamed:1"]

Convert = Callable[..., ConversionReport]
PER_RANK = {"ckpt_format": "torch", "layout": ParallelLayout(tp=2, pp=2, pp_layout=(2, 1))}
VERBS: dict[str, tuple[Convert, str, dict[str, object]]] = {
    "import": (import_hf, "hf", {}),
    "import per rank": (
        import_hf,
        "hf",
        {"ckpt_format": "torch", "layout": ParallelLayout(tp=2, pp=2, pp_layout=(2, 1))},
    ),
    "export": (export_hf, "mg", {"max_shard_bytes": 150_000}),
    "reshard": (reshard, "mg", {}),
}


def convert(verb: str, root: Path, target: Path, armed: str | None = None, **options: object) -> ConversionReport:
    function, source, fixed = VERBS[verb]
    failpoints.arm(armed)
    try:
        return function(root / source, target, progress=False, **{**fixed, **options})
    finally:
        failpoints.arm(None)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stamps(folder: Path, names: object) -> dict[str, tuple[int, int]]:
    return {name: ((folder / name).stat().st_ino, (folder / name).stat().st_mtime_ns) for name in names}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, and the undisturbed result of every verb."""
    folder = tmp_path_factory.mktemp("resume")
    write_tiny_hf(folder / "hf", tiny_dense(layers=3, vocab=131))
    (folder / "hf" / "tokenizer.json").write_text("{}")
    import_hf(folder / "hf", folder / "mg", progress=False)
    for verb in VERBS:
        convert(verb, folder, folder / "expected" / verb)
    return folder


def test_every_point_of_the_conversion_is_tested() -> None:
    assert {name for name in failpoints.REGISTERED if name.startswith("convert.")} <= POINTS.keys()
    assert POINTS.keys() <= failpoints.REGISTERED.keys()


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("verb", "points"), [("import", ARMED), ("export", ARMED), ("import per rank", FEW), ("reshard", FEW)]
)
def test_a_conversion_killed_at_any_point_resumes_to_the_same_bytes(
    root: Path, tmp_path: Path, verb: str, points: list[str]
) -> None:
    expected = tree(root / "expected" / verb)
    reused_somewhere = 0
    for number, armed in enumerate(points):
        target = tmp_path / str(number) / "out"
        (outcome,) = run_forked(convert, 1, verb, root, target, f"{armed}:kill")
        assert outcome.status == -signal.SIGKILL, (armed, outcome)
        assert target.exists() == armed.startswith(RENAMED), armed
        assert not target.exists() or tree(target) == expected, armed
        (left,) = stale_staging(target.parent)
        journal = Journal.load(left / JOURNAL_NAME)
        finished = () if journal is None else journal.finished
        before = stamps(left / OUTPUT_NAME if (left / OUTPUT_NAME).exists() else target, finished)
        report = convert(verb, root, target, resume=True)
        assert tree(target) == expected, armed
        assert stale_staging(target.parent) == [], armed
        assert stamps(target, finished) == before, armed
        assert report.reused_files == len(finished), armed
        reused_somewhere += 0 < len(finished) < len(expected) - 1
    assert reused_somewhere >= 1


@pytest.mark.multirank
@pytest.mark.parametrize("point", POINTS)
def test_an_overwriting_conversion_killed_at_any_point_leaves_the_old_or_the_new_result(
    root: Path, tmp_path: Path, point: str
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    (outcome,) = run_forked(convert_over, 1, root, target, f"{point}:1:kill")
    assert outcome.status == -signal.SIGKILL
    expected = tree(root / "expected" / "export")
    assert tree(target) == (expected if point in RENAMED else {"old": b"old"})
    convert("export", root, target, overwrite=True, resume=True)
    assert tree(target) == expected


def convert_over(root: Path, target: Path, armed: str) -> None:
    convert("export", root, target, armed, overwrite=True)


def interrupted(root: Path, target: Path, armed: str = "convert.journal:2:kill", verb: str = "export") -> Path:
    """Kill a conversion when some files are finished; return its staging folder."""
    before = set(stale_staging(target.parent))
    (outcome,) = run_forked(convert, 1, verb, root, target, armed)
    assert outcome.status == -signal.SIGKILL
    (left,) = set(stale_staging(target.parent)) - before
    return left


@pytest.mark.multirank
def test_a_finished_file_whose_hash_does_not_fit_is_written_again(root: Path, tmp_path: Path) -> None:
    left = interrupted(root, tmp_path / "out")
    finished = json.loads((left / JOURNAL_NAME).read_text())["finished"]
    damaged, *kept = sorted(finished)
    assert kept
    content = bytearray((left / OUTPUT_NAME / damaged).read_bytes())
    content[-3] ^= 1
    (left / OUTPUT_NAME / damaged).write_bytes(content)
    before = stamps(left / OUTPUT_NAME, kept)
    report = convert("export", root, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(root / "expected" / "export")
    assert stamps(tmp_path / "out", kept) == before
    assert report.reused_files == len(kept)


@pytest.mark.multirank
def test_the_newest_fitting_folder_is_resumed_and_the_others_are_listed(root: Path, tmp_path: Path, caplog) -> None:
    older, newer = (interrupted(root, tmp_path / "out") for _ in range(2))
    os.utime(older, ns=(1, 1))
    strange = [tmp_path / f"out.incomplete-{name}" for name in ("garbage", "begun", "lost")]
    strange[0].mkdir()
    (strange[1] / OUTPUT_NAME).mkdir(parents=True)
    (strange[2] / OUTPUT_NAME / "release").mkdir(parents=True)
    convert("export", root, tmp_path / "out", resume=True)
    assert tree(tmp_path / "out") == tree(root / "expected" / "export")
    assert f"resuming {newer.name}" in caplog.text
    assert f"{older.name} (older)" in caplog.text
    assert "out.incomplete-garbage (no journal)" in caplog.text
    assert "out.incomplete-begun (killed before it began; deleted)" in caplog.text
    assert set(stale_staging(tmp_path)) == {older, strange[0], strange[2]}


@pytest.mark.multirank
def test_another_conversion_starts_anew_and_says_what_differs(root: Path, tmp_path: Path, caplog) -> None:
    left = interrupted(root, tmp_path / "out")
    report = convert("export", root, tmp_path / "out", resume=True, max_shard_bytes=10**9)
    assert report.reused_files == 0
    assert "nothing to resume, so the conversion starts anew" in caplog.text
    assert f"{left.name} (differs in files, options)" in caplog.text
    assert stale_staging(tmp_path) == [left]


@pytest.mark.multirank
def test_a_source_that_changed_since_is_not_resumed(root: Path, tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", tiny_dense(layers=3, vocab=131))
    left = interrupted(tmp_path, tmp_path / "out", verb="import")
    write_tiny_hf(tmp_path / "hf", tiny_dense(layers=3, vocab=131), seed=1)
    import_hf(tmp_path / "hf", tmp_path / "out", resume=True, progress=False)
    import_hf(tmp_path / "hf", tmp_path / "new", progress=False)
    assert tree(tmp_path / "out") == tree(tmp_path / "new")
    assert stale_staging(tmp_path) == [left]


def test_a_folder_that_another_process_writes_is_left_alone(root: Path, tmp_path: Path, caplog) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests/conversion')\n"
        "from test_conversion_resume import convert\n"
        f"convert('export', Path({str(root)!r}), Path({str(tmp_path / 'out')!r}), 'convert.journal:2:stop')"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            os.waitpid(process.pid, os.WUNTRACED)
            (running,) = stale_staging(tmp_path)
            convert("export", root, tmp_path / "out", resume=True)
            assert f"{running.name} (another process is writing it)" in caplog.text
            assert running.is_dir()
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_130_and_the_command_that_goes_on(root: Path, tmp_path: Path, number: int) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-m", "megatron_qwen", "convert", "export", str(root / "mg"), str(target)]
    command += ["--max-shard-size", "150KB", "--threads", "1", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEGATRON_QWEN_FAILPOINT": "convert.journal:2:stop"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        os.waitpid(process.pid, os.WUNTRACED)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not target.exists()
    (left,) = stale_staging(tmp_path)
    assert left.name in errors
    resume = shlex.split(errors.strip().splitlines()[-1])
    assert resume == ["megatron-qwen", *command[3:], "--resume"]
    done = subprocess.run([sys.executable, "-m", "megatron_qwen", *resume[1:]], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused_files"] >= 2
    assert tree(target) == tree(root / "expected" / "export")
    assert stale_staging(tmp_path) == []


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_an_error_at_any_point_leaves_nothing_aside(root: Path, tmp_path: Path, point: str, action: str) -> None:
    with pytest.raises(StorageError if action == "enospc" else failpoints.FailPointError):
        convert("export", root, tmp_path / "out", f"{point}:1:{action}")
    assert stale_staging(tmp_path) == []
    assert (tmp_path / "out").exists() == (point in RENAMED)


def test_bad_weights_leave_nothing_aside(tmp_path: Path) -> None:
    write_tiny_hf(tmp_path / "hf", tiny_dense(layers=1), seed=3)
    with pytest.raises(NumericsError):
        import_hf(poison(tmp_path / "hf"), tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def poison(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\xff" * 4)
    return folder
