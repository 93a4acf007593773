"""The exceptions a user can meet, and the exit code that the command line gives each.

Every message says what is wrong, where, what was found, what was expected and what to do next.
"""

from __future__ import annotations


class QwenError(Exception):
    """Base of every error this project raises on purpose.

    Attributes:
        exit_code: process status of `megatron-qwen` when the error reaches the command line.
    """

    exit_code: int = 1


class ConfigError(QwenError, ValueError):
    """The request itself is wrong: an option, a recipe field, a layout, a model configuration."""

    exit_code = 2


class InputError(QwenError, ValueError):
    """Something read from disk cannot be used; base of the four kinds below."""

    exit_code = 3


class UnsafeInputError(InputError):
    """Reading on would execute code or leave the given folder."""


class CorruptInputError(InputError):
    """A file is damaged: truncated, overlapping, out of range, not what its header says."""


class IncompleteInputError(InputError):
    """Files or tensors are missing."""


class MismatchError(InputError):
    """Two inputs, each fine by itself, contradict each other."""


class StorageError(QwenError, OSError):
    """The disk is full, read-only, locked by another run, or the target is in the way."""

    exit_code = 4


class NumericsError(QwenError, ArithmeticError):
    """NaN, infinity or overflow where a finite number is needed."""

    exit_code = 5


class RankFailure(QwenError, RuntimeError):
    """A rank of the job died or stopped answering."""

    exit_code = 6


INTERRUPTED_EXIT_CODE = 130


class Interrupted(QwenError):
    """SIGINT or SIGTERM ended the work; the message says how to go on with it."""

    exit_code = INTERRUPTED_EXIT_CODE
