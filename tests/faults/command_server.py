"""Commands in processes of their own that may die: forked in some milliseconds from one that has imported torch.

with CommandServer() as server:
    process = server.start("convert", "import", hf, out, failpoint="convert.piece:1:kill")
    process.wait()                                   # Ended(code=-9, ...)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hostile import Ended


class Command:
    """A running command; its output goes to files, so that nothing waits for a reader."""

    def __init__(self, server: CommandServer, pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output

    def wait(self, timeout: float = 60) -> Ended:
        """Wait for the end; a negative code is the signal that killed it."""
        code = self._server.ask({"wait": self.pid, "timeout": timeout})
        if code is None:
            self.signal(signal.SIGKILL)
            self._server.ask({"wait": self.pid, "timeout": timeout})
            raise AssertionError(f"still running after {timeout} s: {self._text('out')} {self._text('err')}")
        return Ended(int(code), self._text("out"), self._text("err"))

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_until_stopped(self, timeout: float = 60) -> None:
        """Wait until a fail point has stopped the process."""
        deadline = time.monotonic() + timeout
        while self._state() != "T":
            assert time.monotonic() < deadline, f"not stopped; {self._text('err')}"
            time.sleep(0.005)

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def _text(self, stream: str) -> str:
        return self._output.with_suffix(f".{stream}").read_text(errors="replace")


class CommandServer:
    """The process that the commands are forked from."""

    def __enter__(self) -> CommandServer:
        self._folder = tempfile.TemporaryDirectory(prefix="commands-")
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # it kills what still runs, and ends
        self._process.wait(30)
        self._folder.cleanup()

    def start(self, *arguments: object, failpoint: str | None = None, file_limit: int | None = None) -> Command:
        """Start `megatron-qwen ARGUMENTS`.

        Args:
            arguments: of the command line.
            failpoint: armed in it.
            file_limit: largest file it may write (RLIMIT_FSIZE); writing on fails, as on a full disk.
        """
        self._count += 1
        output = Path(self._folder.name) / str(self._count)
        request = {
            "arguments": [str(argument) for argument in arguments],
            "failpoint": failpoint,
            "file_limit": file_limit,
            "output": str(output),
        }
        return Command(self, self.ask(request), output)

    def run(self, *arguments: object, failpoint: str | None = None, file_limit: int | None = None) -> Ended:
        """Start a command and wait for its end."""
        return self.start(*arguments, failpoint=failpoint, file_limit=file_limit).wait()

    def registered(self) -> list[str]:
        """Return the fail points that the commands know."""
        return list(self.ask({"registered": True}))

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    from megatron_qwen import conversion
    from megatron_qwen.cli import app
    from megatron_qwen.conversion import run
    from megatron_qwen.conversion.comparison import weights
    from megatron_qwen.testing import failpoints

    assert all((conversion, run, weights))  # imported here once for all
    app.build_app()
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "registered" in request:
            answer: Any = sorted(failpoints.REGISTERED)
        elif "wait" in request:
            answer = _wait(request["wait"], request["timeout"])
            if answer is not None:
                running.discard(request["wait"])
        else:
            answer = os.fork()
            if answer == 0:
                _run(request)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _wait(pid: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def _run(request: dict[str, Any]) -> None:
    """Be the command: this returns never."""
    import resource

    from megatron_qwen.cli import app
    from megatron_qwen.testing import failpoints

    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['output']}.{suffix}", os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    failpoints.arm(request["failpoint"])
    if request["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], resource.RLIM_INFINITY))
    sys.argv = ["megatron-qwen", *request["arguments"]]
    code: Any = 1
    try:
        app.main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
