"""What can be shown of csrc without a GPU: it compiles for sm_80 and sm_90a without spills, with 16-byte accesses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from source_tree import ROOT

TOOLS = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
TOOLKIT = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=str(TOOLKIT))
ARCHITECTURES = ("sm_80", "sm_90a")
KERNELS = {
    *("column_sum_kernel", "copy_bandwidth_kernel", "rms_norm_forward_kernel", "rms_norm_backward_kernel"),
    *("qkv_rope_forward_kernel", "qkv_rope_backward_kernel", "rope_kernel"),
    *("swiglu_forward_kernel", "swiglu_backward_kernel"),
    *("moe_row_map_kernel", "moe_combine_kernel", "moe_gate_kernel", "moe_gate_gradient_kernel"),
    *("grouped_rows_kernel", "grouped_weight_gradient_kernel", "attention_forward_kernel"),
    *("attention_rotate_kernel", "attention_row_terms_kernel"),
    *("attention_keys_backward_kernel", "attention_queries_backward_kernel"),
}
# Grouped GEMMs, by the numbers of the passes in csrc/kernels/row_gemm.cuh: up, down, SwiGLU's backward, input gradient.
GEMMS = [
    f"{name}{of}"
    for of in ("6__half", "13__nv_bfloat16")
    for name in (
        *(f"grouped_rows_kernel LNS_7RowPassE{number}E" for number in range(4)),
        "grouped_weight_gradient_kernel ",
    )
]
ATTENTION = {
    f"attention_forward_kernel {dtype}Li{size}": size for dtype in ("6__half", "13__nv_bfloat16") for size in (64, 128)
}
ATTENTION_GRADIENTS = {
    f"attention_{side}_backward_kernel {dtype}Li{size}": (side, size)
    for side in ("keys", "queries")
    for dtype in ("6__half", "13__nv_bfloat16")
    for size in (64, 128)
}
# Their warpgroups share out 168 registers of each of 384 threads anew: setmaxnreg.
GEMM_REGISTERS = 168
# Of int32 and of int64: one of the two runs.
POSITION = {"LDG 4": 1, "LDG 8": 1}
TWO_POSITIONS = {"LDG 4": 2, "LDG 8": 2}
VECTORS = ("6__halfLi8", "13__nv_bfloat16Li8", "fLi4")
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on PATH, under CUDA_HOME or /usr/local/cuda")


def machine_code(library: Path) -> str:
    """SASS of `library`, by the tools of the toolkit or those that the development requirements install."""
    packaged = [str(Path(entry) / "nvidia/cu13/bin") for entry in sys.path if entry]
    path = os.pathsep.join([os.environ["PATH"], str(TOOLKIT), *packaged])
    cuobjdump = shutil.which("cuobjdump", path=path)
    assert cuobjdump, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    command = [cuobjdump, "-sass", str(library)]
    return subprocess.run(command, env={**os.environ, "PATH": path}, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The CMake build folder and its log."""
    folder = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "PATH": TOOLS}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DMEGATRON_QWEN_CUDA=on"]
    log = ""
    for command in (
        [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
        ["cmake", "--build", str(folder)],
        ["ctest", "--test-dir", str(folder), "--output-on-failure"],
    ):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        log += result.stdout + result.stderr
        assert result.returncode == 0, log
    return folder, log


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What ptxas reports of one kernel for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int


def compiled_kernels(log: str) -> list[Compiled]:
    report = re.compile(
        r"Compiling entry function '(\S+)' for '(\S+)'\n.*\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*Used (\d+) registers"
    )
    return [
        Compiled(
            name=kernel_name(symbol),
            architecture=architecture,
            registers=int(registers),
            stack=int(stack),
            spilled=int(stores) + int(loads),
        )
        for symbol, architecture, stack, stores, loads, registers in report.findall(log)
    ]


def kernel_name(symbol: str) -> str:
    """The name of a kernel and its template arguments as they are mangled: "column_sum_kernel 6__half"."""
    found = re.search(r"\d((?:[a-z_]+)_kernel)(?:I(.+?)EEv|E)", symbol)
    assert found, symbol
    return f"{found[1]} {(found[2] or '').rstrip('E')}".strip()


def test_no_kernel_spills_registers_or_has_a_stack_on_any_architecture(build: tuple[Path, str]) -> None:
    kernels = compiled_kernels(build[1])
    assert len(kernels) == build[1].count("Compiling entry function")
    names = {
        architecture: {each.name for each in kernels if each.architecture == architecture}
        for architecture in ARCHITECTURES
    }
    assert names["sm_80"] == names["sm_90a"]
    assert {name.split()[0] for name in names["sm_80"]} >= KERNELS
    for each in kernels:
        assert (each.spilled, each.stack) == (0, 0), each
        # 256 threads of 128 registers: two blocks on a multiprocessor.
        assert each.registers <= (GEMM_REGISTERS if each.name in {*GEMMS, *ATTENTION, *ATTENTION_GRADIENTS} else 128), (
            each
        )
    # ptxas says so where it cannot let multiplications run on while registers are used.
    assert "wgmma.mma_async instructions are serialized" not in build[1]


@pytest.fixture(scope="module")
def functions(build: tuple[Path, str]) -> dict[tuple[str, str], str]:
    """For each architecture and kernel, its machine code."""
    found: dict[tuple[str, str], str] = {}
    architecture = ""
    library = build[0] / "libmegatron_qwen_kernels.a"
    for part in re.split(r"\n\s*(?=code for sm_|Function : )", machine_code(library)):
        if match := re.match(r"code for (sm_\w+)", part):
            architecture = match[1]
        elif match := re.match(r"Function : (\S+)", part):
            found[architecture, kernel_name(match[1])] = part
    return found


def accesses(code: str) -> Counter[str]:
    """How many loads and stores, by their width; those of shared memory left out."""
    found = re.findall(r"\b(LDG|STG|LDL|STL|LD|ST|ATOMG|ATOM|REDG|RED)\b((?:\.\w+)*)", code)
    return Counter(f"{name} {width(suffix)}" for name, suffix in found)


def width(suffix: str) -> int:
    """Bytes of one access: 4 unless the instruction says otherwise."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((size for name, size in sizes.items() if name in suffix.split(".")), 4)


@pytest.fixture(scope="module")
def memory_accesses(functions: dict[tuple[str, str], str]) -> dict[tuple[str, str], Counter[str]]:
    return {key: accesses(code) for key, code in functions.items()}


# Loads and stores of 16 bytes, and what else there may be: the tail of the copy, a position, one number per row.
WIDE = {
    "copy_bandwidth_kernel": ({"LDG 16": 5, "STG 16": 5}, {"LDG 1": 1, "STG 1": 1}),
    "qkv_rope_forward_kernel 6__halfLi8ELb1": ({"LDG 16": 16, "STG 16": 6}, POSITION),
    "qkv_rope_forward_kernel 13__nv_bfloat16Li8ELb1": ({"LDG 16": 16, "STG 16": 6}, POSITION),
    "qkv_rope_forward_kernel 13__nv_bfloat16Li8ELb0": ({"LDG 16": 10, "STG 16": 6}, POSITION),
    "qkv_rope_forward_kernel fLi4ELb1": ({"LDG 16": 14, "STG 16": 6}, POSITION),
    "qkv_rope_backward_kernel 6__halfLi8": ({"LDG 16": 12, "STG 16": 8}, TWO_POSITIONS),
    "qkv_rope_backward_kernel 13__nv_bfloat16Li8": ({"LDG 16": 12, "STG 16": 8}, TWO_POSITIONS),
    "qkv_rope_backward_kernel fLi4": ({"LDG 16": 8, "STG 16": 6}, TWO_POSITIONS),
    "rope_kernel 6__halfLi8": ({"LDG 16": 10, "STG 16": 6}, POSITION),
    "rope_kernel 13__nv_bfloat16Li8": ({"LDG 16": 10, "STG 16": 6}, POSITION),
    "rope_kernel fLi4": ({"LDG 16": 8, "STG 16": 6}, POSITION),
    **{f"swiglu_forward_kernel {of}": ({"LDG 16": 2, "STG 16": 1}, {}) for of in VECTORS},
    **{f"swiglu_backward_kernel {of}": ({"LDG 16": 3, "STG 16": 2}, {}) for of in VECTORS},
}


@pytest.mark.parametrize("kernel", WIDE)
def test_accesses_are_16_bytes_where_that_is_promised(
    memory_accesses: dict[tuple[str, str], Counter[str]], kernel: str
) -> None:
    wide, narrow = WIDE[kernel]
    for architecture in ARCHITECTURES:
        assert memory_accesses[architecture, kernel] == {**wide, **narrow}, architecture


@pytest.mark.parametrize(("direction", "inverse_rms"), [("forward", "STG 4"), ("backward", "LDG 4")])
def test_norms_are_16_bytes_wide_but_for_one_number_per_row(
    memory_accesses: dict[tuple[str, str], Counter[str]], direction: str, inverse_rms: str
) -> None:
    """How often the unrolled loads appear is the compiler's affair; four weights of 16 bits beside fp32 are 8 bytes."""
    kernels = {key: found for key, found in memory_accesses.items() if f"rms_norm_{direction}_kernel " in key[1] + " "}
    assert len(kernels) == {"forward": 12, "backward": 20}[direction]
    for (architecture, kernel), found in kernels.items():
        weights = {"LDG 8"} if " fL" in kernel else set()
        assert set(found) <= {"LDG 16", "STG 16", inverse_rms} | weights, (architecture, kernel)
        assert found[inverse_rms] == 1
        assert found["LDG 16"] >= 4
        assert found["STG 16"] >= 2


@pytest.mark.parametrize("kernel", GEMMS)
def test_grouped_gemms_are_made_of_what_hopper_has(functions: dict[tuple[str, str], str], kernel: str) -> None:
    """A stage is 64 terms of a sum, 16 per wgmma; rows not gathered come by TMA, as matrices do."""
    code = functions["sm_90a", kernel]
    assert len(re.findall(r"\bHGMMA\.64x256x16\.F32", code)) == 4
    assert not re.search(r"\bHMMA\b", code)
    assert len(re.findall(r"\bUSETMAXREG\b", code)) == 2
    assert re.search(r"\bUTMALDG\.2D\b", code)
    is_plain = any(f"RowPassE{number}E" in kernel for number in (1, 3))
    assert bool(re.search(r"\bLDGSTS\.E\.BYPASS\.128\b", code)) == (not is_plain)
    found = accesses(code)
    # Offsets of groups; a row's token, weight and partial sum; all else is 16 bytes wide.
    assert found["STG 4"] == (2 if "RowPassE2E" in kernel else 0)
    assert {name for name in found if name.startswith("LDG")} <= {"LDG 4", "LDG 8", "LDG 16"}
    assert set(found) <= {"LDG 4", "LDG 8", "LDG 16", "STG 4", "STG 16"}
    assert found["STG 16"] >= 8


@pytest.mark.parametrize(("kernel", "size"), ATTENTION.items())
def test_attention_is_made_of_what_hopper_has(functions: dict[tuple[str, str], str], kernel: str, size: int) -> None:
    """Logits of 128 keys over the numbers of a head, and output of those keys: for the first block, and in the loop."""
    code = functions["sm_90a", kernel]
    products = Counter(re.findall(r"\bHGMMA\.(\w+)\.F32", code))
    assert products == Counter({"64x128x16": 2 * size // 16}) + Counter({f"64x{size}x16": 2 * 128 // 16})
    assert not re.search(r"\bHMMA\b", code)
    assert len(re.findall(r"\bUSETMAXREG\b", code)) == 2
    # Keys and values, in boxes of 64 numbers of a head.
    assert len(re.findall(r"\bUTMALDG\.4D\b", code)) == 2 * size // 64
    # Operands that no TMA brings: rotated queries, zeros behind the last values.
    assert set(re.findall(r"\bSTS\S*", code)) == {"STS.128"}
    assert "LDS" not in code
    found = accesses(code)
    # Both halves of 8 numbers and their angles; boundaries and tiles of packed sequences, temperatures; the lse.
    assert found["LDG 16"] == 6
    assert (found["STG 16"], found["STG 4"]) == (size // 16, 2)
    assert set(found) <= {"LDG 4", "LDG 8", "LDG 16", "STG 4", "STG 16"}


@pytest.mark.parametrize(("kernel", "side", "size"), [(name, *of) for name, of in ATTENTION_GRADIENTS.items()])
def test_gradients_of_attention_are_made_of_what_hopper_has(
    functions: dict[tuple[str, str], str], kernel: str, side: str, size: int
) -> None:
    """Steps of 64 rows or keys: two products over the numbers of a head, and sums of 64 terms with operands in
    registers; of keys two, of queries one, whose first step stands before the loop and whose last sum behind it."""
    code = functions["sm_90a", kernel]
    rounds, sums = {"keys": (1, 2), "queries": (2, 2)}[side]
    products = Counter(re.findall(r"\bHGMMA\.(\w+)\.F32", code))
    assert products == Counter({"64x64x16": rounds * 2 * size // 16}) + Counter({f"64x{size}x16": sums * 64 // 16})
    # The groups of multiplications that are waited for; one wait per multiplication would mean none runs beside others.
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 4
    assert not re.search(r"\bHMMA\b", code)
    assert len(re.findall(r"\bUSETMAXREG\b", code)) == 2
    assert re.search(r"\bUTMALDG\.4D\b", code)
    # Steps that end within a sequence.
    assert re.search(r"\bLDGSTS\.E\.BYPASS\.128\b", code)
    found = accesses(code)
    # Angles of two neighbouring numbers; boundaries, tiles, and what belongs to a row.
    assert set(found) <= {"LDG 4", "LDG 8", "STG 16"}
    assert found["STG 16"] >= size // 16


def test_no_kernel_has_atomics_or_local_memory(memory_accesses: dict[tuple[str, str], Counter[str]]) -> None:
    for kernel, found in memory_accesses.items():
        assert {name.split()[0] for name in found} <= {"LDG", "STG"}, kernel


def test_ctest_ran_the_host_checks(build: tuple[Path, str]) -> None:
    for name in ("host", "qkv_rope_host"):
        assert re.search(rf" {name} \.+\s+Passed", build[1])


def run_module(folder: Path, code: str) -> str:
    """Run `code` after `import _C` of the CUDA build, in a process of its own."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\nimport _C\n{code}"
    result = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_cuda_build_imports_without_a_gpu_and_lists_its_architectures(build: tuple[Path, str]) -> None:
    printed = run_module(build[0], "info = _C.build_info(); print(info['cuda_compiled'], *info['cuda_architectures'])")
    assert printed == "True 80 90a-real"


def test_without_a_device_the_copy_fails_with_the_words_of_cuda(build: tuple[Path, str]) -> None:
    code = """
try:
    _C.copy_bandwidth(0x1000, 0x2000, 16)
except (RuntimeError, ValueError) as error:
    print(error)
"""
    printed = run_module(build[0], code)
    # With a GPU these invented addresses are refused as host memory, without one the driver is missing.
    assert "copy_bandwidth: " in printed
    assert "cudaError" in printed or "host memory" in printed
