"""What the fault tests share: the command as a user types it, hostile files, and witnesses of what was opened."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from safetensors.torch import load_file, save_file

from megatron_qwen.checkpoint import manifest
from megatron_qwen.cli import app
from megatron_qwen.errors import QwenError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, what it printed, processor time and growth of memory (where it was limited)."""

    code: int
    out: str
    err: str
    seconds: float = 0.0

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(self.out)


def command(*arguments: object) -> Ended:
    """Run `megatron-qwen ARGUMENTS` in this process, error handling and exit code included.

    An exception that is none of ours comes through, as a traceback would at the user's.
    """
    out, err = io.StringIO(), io.StringIO()
    argv = ["megatron-qwen", *map(str, arguments)]
    started = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "argv", argv):
        try:
            app.main()
            code: Any = 0
        except SystemExit as ended:
            code = ended.code
    return Ended(code or 0, out.getvalue(), err.getvalue(), time.process_time() - started)


def require_refusal(ended: Ended, kind: type[QwenError]) -> str:
    """Require that a command failed with `kind` and its exit code; return its message."""
    assert ended.err.lstrip().startswith(f"megatron-qwen: {kind.__name__}: "), ended
    assert ended.code == kind.exit_code, ended
    return ended.err


def refused(kind: type[QwenError], *arguments: object, within: Path) -> str:
    """Run a command that has to fail with `kind` and change nothing below `within`; return its message."""
    before = tree(within)
    message = require_refusal(command(*arguments), kind)
    assert tree(within) == before
    return message


def importing(folder: Path) -> tuple[object, ...]:
    """Return the import of a folder into its neighbour `out`."""
    return "convert", "import", folder, folder.parent / "out", "--json"


def exporting(folder: Path) -> tuple[object, ...]:
    """Return the export of a folder into its neighbour `out`."""
    return "convert", "export", folder, folder.parent / "out", "--json"


def refuse(kind: type[QwenError], folder: Path) -> str:
    """Require that the import of a folder fails with `kind` and leaves nothing; return the message."""
    return refused(kind, *importing(folder), within=folder.parent)


def fuzzed(max_examples: int) -> settings:
    kept = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=max_examples, deadline=None, suppress_health_check=kept)


def run_limited(commands: Sequence[Sequence[object]], *, megabytes: int, timeout: float = 120) -> list[Ended]:
    """Run commands one after another in one process whose address space may grow by so much (RLIMIT_AS).

    The first command is run before the limit is set, so that imports do not count.
    """
    done = subprocess.run(
        [sys.executable, __file__, str(megabytes)],
        input=json.dumps([[str(argument) for argument in arguments] for arguments in commands]),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Ended(**fields) for fields in json.loads(done.stdout)]


def _serve_limited(megabytes: int) -> None:
    first, *others = json.loads(sys.stdin.read())
    ended = [command(*first)]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for arguments in others:
        try:
            ended.append(command(*arguments))
        except Exception as error:
            ended.append(Ended(1, "", f"{type(error).__name__}: {error}"))
    print(json.dumps([asdict(each) for each in ended]))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every path below `folder`, with size and time of change of the files."""
    found = {}
    for root, folders, files in os.walk(folder):
        found |= {str(Path(root) / name): (0, 0) for name in folders}
        for name in files:
            status = (Path(root) / name).lstat()
            found[str(Path(root) / name)] = (status.st_size, status.st_mtime_ns)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `folder` by its name there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def forge_manifest(folder: Path) -> None:
    """Write the manifest anew where there is one: an attacker can do that as well as we can."""
    if (folder / manifest.MANIFEST_NAME).is_file():
        manifest.write_manifest(folder)


def header_bytes(path: Path) -> int:
    """Return the length of a safetensors header without the 8 bytes that hold it."""
    with path.open("rb") as stream:
        return struct.unpack("<Q", stream.read(8))[0]


class Payload:
    """A pickle that leaves a file behind when its code is run."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.sentinel}",)


_watchers: list[Callable[[str, tuple[Any, ...]], None]] = []


def _dispatch(event: str, arguments: tuple[Any, ...]) -> None:
    for watcher in _watchers:
        watcher(event, arguments)


sys.addaudithook(_dispatch)  # cannot be taken away again, so there is one for all tests


@contextlib.contextmanager
def watched(watcher: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `watcher(event, arguments)` for every audit event of the block."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def opens() -> Iterator[list[str]]:
    """Give the list of the paths that the block opens."""
    seen: list[str] = []

    def record(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            seen.append(os.fsdecode(arguments[0]))

    with watched(record):
        yield seen


if __name__ == "__main__":
    _serve_limited(int(sys.argv[1]))
