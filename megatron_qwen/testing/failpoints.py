"""Named places in the code where a test can kill, stop or fail the process; free when none is armed.

A module that writes files registers its points at import and calls `hit` where they lie:

    failpoints.register("save.staged", "the staging folder exists, nothing is in it")
    ...
    failpoints.hit("save.staged")

One environment variable arms one point, `MEGATRON_QWEN_FAILPOINT=name:nth:action[:rank]`: at the nth time
(from 1) that the process, or the given rank only, reaches the point, it does

- `kill`: SIGKILL to itself, as the out-of-memory killer does; nothing is flushed or cleaned up
- `stop`: SIGSTOP to itself, as a stuck node looks to the others
- `raise`: raises `FailPointError`
- `enospc`: raises OSError(ENOSPC), as a full disk does

The variable is read once, when this module is imported, so it has to be set before the process starts.
"""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import dataclass

from megatron_qwen.errors import ConfigError

ENVIRONMENT_VARIABLE = "MEGATRON_QWEN_FAILPOINT"
ACTIONS = ("kill", "stop", "raise", "enospc")

REGISTERED: dict[str, str] = {}
"""Every point of the modules imported so far: name -> the state of the disk at that moment."""


class FailPointError(RuntimeError):
    """Raised by a point armed with the action `raise`."""


@dataclass
class _Armed:
    name: str
    nth: int
    action: str
    rank: str | None
    reached: int = 0


def register(name: str, description: str) -> None:
    """Enter a point into the table; call it once per point, at module level."""
    assert name not in REGISTERED, name
    REGISTERED[name] = description


def hit(name: str) -> None:
    """Do what the environment asks for at point `name`; nothing if it is not armed.

    Raises:
        FailPointError: armed with `raise`.
        OSError: armed with `enospc`.
    """
    if _armed is None or _armed.name != name or _armed.rank not in (None, os.environ.get("RANK", "0")):
        return
    assert name in REGISTERED, name
    _armed.reached += 1
    if _armed.reached != _armed.nth:
        return
    if _armed.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif _armed.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif _armed.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"fail point {name}")
    else:
        raise FailPointError(f"fail point {name}")


def arm(text: str | None) -> None:
    """Arm as the environment variable does, from now on and in this process; None disarms.

    Raises:
        ConfigError: the text is not name:nth:action[:rank].
    """
    global _armed
    _armed = _parse(text)


def _parse(text: str | None) -> _Armed | None:
    if not text:
        return None
    fields = text.split(":")
    if len(fields) not in (3, 4) or not fields[1].isdecimal() or int(fields[1]) < 1 or fields[2] not in ACTIONS:
        raise ConfigError(
            f"{ENVIRONMENT_VARIABLE}={text!r}: expected name:nth:action[:rank] with nth from 1 and an action of "
            + ", ".join(ACTIONS)
        )
    return _Armed(fields[0], int(fields[1]), fields[2], fields[3] if len(fields) == 4 else None)


_armed = _parse(os.environ.get(ENVIRONMENT_VARIABLE))
