"""A contestant in a process of its own, stepped on command.

A process each, because the CPU stand-in of `parallel/device.py` must not meet `transformers`, because
peak memory is then each contestant's own, and because thread settings are read at start.
Parent and child talk in JSON lines; the child times its own steps, so the pipe costs nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

from megatron_qwen.benchmark.breakdown import Breakdown, Part
from megatron_qwen.errors import ConfigError, RankFailure


class Runner(Protocol):
    """What a contestant's factory returns.

    Attributes:
        amount: units of work per step (tokens, bytes ...).
        flops: floating-point operations per step; 0 where they are not the point.
    """

    amount: float
    flops: float

    def step(self) -> float:
        """Do the work once, to the end, and return a value that all contestants must agree on."""
        ...


class ProfiledRunner(Runner, Protocol):
    """A Runner that can say where the time of its steps goes."""

    def breakdown(self, **request: Any) -> Breakdown:
        """Take some more steps under the profiler; `request` is what was given to `Worker.breakdown`."""
        ...


@dataclass(frozen=True)
class Step:
    """One step: its seconds, its check value, and the processor seconds of all its threads."""

    seconds: float
    value: float
    cpu_seconds: float


class Worker:
    """Parent side: starts the process, waits until its contestant is built, and asks for steps.

    Args:
        name: of the contestant, for messages.
        factory: `package.module:function`, called in the child with `arguments`; returns a Runner.
        arguments: JSON values.
        threads: OMP_NUM_THREADS and torch's thread count; None leaves both alone.

    Attributes:
        start_seconds: until the contestant was built: interpreter, imports, whatever its factory does.
        start_bytes: resident set of the child then.

    Raises:
        RankFailure: the child died; the message ends with its output.
    """

    def __init__(self, name: str, factory: str, arguments: Mapping[str, Any], *, threads: int | None = None) -> None:
        self.name = name
        began = time.perf_counter()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by close()
        environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        facts = self._ask({"factory": factory, "arguments": dict(arguments), "threads": threads})
        self.amount: float = facts["amount"]
        self.flops: float = facts["flops"]
        self.versions: dict[str, str] = facts["versions"]
        self.start_bytes: int = facts["bytes"]
        self.start_seconds = time.perf_counter() - began

    def step(self) -> Step:
        """Have the contestant do its work once."""
        answer = self._ask("step")
        return Step(answer["seconds"], answer["value"], answer["cpu"])

    def peak_bytes(self) -> int:
        """Return the most memory the child ever held, in bytes: on a GPU allocated there, else resident."""
        return int(self._ask("peak")["bytes"])

    def breakdown(self, **request: Any) -> Breakdown:
        """Have a contestant that is a `ProfiledRunner` take some steps under the profiler."""
        found = self._ask({"breakdown": request})
        return Breakdown(**{**found, "parts": tuple(Part(**part) for part in found["parts"])})

    def close(self) -> None:
        """End the child."""
        self._process.communicate()
        self._log.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def _ask(self, request: Any) -> Any:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        try:
            pipe_in.write(json.dumps(request) + "\n")
            pipe_in.flush()
            line = pipe_out.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._log.seek(0)
        raise RankFailure(f"contestant {self.name} ended with status {status}:\n{self._log.read()[-4000:]}")


def _load(factory: str) -> Any:
    module, separator, function = factory.partition(":")
    if not separator:
        raise ConfigError(f"factory: got {factory!r}, expected package.module:function")
    return getattr(importlib.import_module(module), function)


def _versions() -> dict[str, str]:
    """Return the versions of the libraries this process has loaded, and of Python."""
    from importlib import metadata

    known = {
        "torch": "torch",
        "megatron.core": "megatron-core",
        "transformers": "transformers",
        "tokenizers": "tokenizers",
    }
    found = {package: metadata.version(package) for module, package in known.items() if module in sys.modules}
    return {"python": sys.version.split()[0], **found}


def _resident_bytes() -> int:
    # Linux; elsewhere the peak, which is never less.
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _peak_bytes()


def _peak_bytes() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    # getrusage's figure survives fork and exec on Linux: it would start at the parent's size.
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _serve(requests: IO[str], answers: IO[str]) -> None:
    def answer(content: Mapping[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    order = json.loads(requests.readline())
    if order["threads"]:
        import torch

        torch.set_num_threads(order["threads"])
    runner: Any = _load(order["factory"])(**order["arguments"])
    answer({"amount": runner.amount, "flops": runner.flops, "versions": _versions(), "bytes": _resident_bytes()})
    for line in requests:
        request = json.loads(line)
        if request == "peak":
            answer({"bytes": _peak_bytes()})
            continue
        if isinstance(request, dict):
            answer(asdict(runner.breakdown(**request["breakdown"])))
            continue
        start, cpu_start = time.perf_counter(), time.process_time()
        value = runner.step()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        answer({"seconds": seconds, "value": value, "cpu": cpu_seconds})


if __name__ == "__main__":
    # Whatever a library prints must not end up between the JSON lines.
    real_stdout = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _serve(sys.stdin, real_stdout)
