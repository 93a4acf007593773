"""megatron_qwen._C as it was installed here."""

from __future__ import annotations

import os
import shutil

import pytest

import megatron_qwen

if shutil.which(os.environ.get("CXX", "c++")) is None:
    pytest.skip("no C++ compiler: the extension is optional", allow_module_level=True)

from megatron_qwen import _C  # only where it can have been built


def test_the_extension_is_of_this_version() -> None:
    info = _C.build_info()
    assert info["version"] == megatron_qwen.__version__
    assert info["cxx_compiler"]
    assert info["cuda_compiled"] == bool(info["cuda_architectures"]) == bool(info["cuda_compiler"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0x1000, 0x2000, -1), "num_bytes = -1; expected 0 or more"),
        ((0, 0x2000, 16), "destination is a null pointer"),
        ((0x1000, 0x2008, 16), "source = 0x2008 is not a multiple of 16 bytes"),
        ((0x1000, 0x1010, 17), "16 bytes apart and overlap in a copy of 17 bytes"),
        ((0x1000, 0x2000, 2**33), "overlap in a copy of 8589934592 bytes"),
    ],
)
def test_bad_copies_are_refused_with_their_values(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _C.copy_bandwidth(*arguments)


def test_num_blocks_is_bounded() -> None:
    with pytest.raises(ValueError, match="num_blocks = -1; expected 0"):
        _C.copy_bandwidth(0x1000, 0x2000, 16, num_blocks=-1)


def test_a_build_without_cuda_says_how_to_get_the_kernel() -> None:
    if _C.build_info()["cuda_compiled"]:
        pytest.skip("this build has CUDA kernels")
    with pytest.raises(RuntimeError, match="built without CUDA kernels; reinstall where nvcc is"):
        _C.copy_bandwidth(0x1000, 0x2000, 16)
