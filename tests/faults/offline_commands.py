"""Runs commands one after another in one process in which no socket can reach another machine.

python offline_commands.py "convert import hf mg" "convert verify hf mg"
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
from typing import Any

HOST = "host-with-a-private-name"
TRUE_HOST = socket.gethostname()
LOOPBACK = ("127.0.0.1", "::1", "localhost", "", None)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        connection, address = arguments
        if connection.family == socket.AF_UNIX or address[0] in LOOPBACK:
            return  # ranks of one machine meet there
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[0]
        if address in (*LOOPBACK, HOST, TRUE_HOST):
            return
    elif event == "socket.sendto":
        address = arguments[1]
    else:
        return
    print(f"offline: refused {event} {address}", flush=True)
    raise OSError(f"no network here: {event} {address}")


def block_network() -> None:
    """Refuse, from now on and in this process, to connect to another machine or to look up its name."""
    sys.addaudithook(_refuse)


def _rename_host() -> None:
    """Give the machine a name that can be found in a file; the true one may be "vm"."""
    true = os.uname()
    socket.gethostname = lambda: HOST
    os.uname = lambda: os.uname_result((true.sysname, HOST, true.release, true.version, true.machine))
    platform.node = lambda: HOST


def _run(commands: list[str]) -> None:
    from megatron_qwen.cli import app

    block_network()
    _rename_host()
    for text in commands:
        sys.argv = ["megatron-qwen", *shlex.split(text)]
        print(f"$ {text}", flush=True)
        try:
            app.main()
        except SystemExit as ended:
            if ended.code:
                raise
    print(f"offline: {len(commands)} commands")


if __name__ == "__main__":
    _run(sys.argv[1:])
