"""CUDA kernels of rms_norm and swiglu run on the CPU (csrc/tests/emulation), through the operations."""

from __future__ import annotations

import op_checks
import pytest
import torch
from emulated_extension import Emulation

from megatron_qwen import ops
from megatron_qwen.kernels.rms_norm import cuda as rms_norm_cuda
from megatron_qwen.kernels.rms_norm import reference as rms_norm_reference
from megatron_qwen.kernels.swiglu import cuda as swiglu_cuda
from megatron_qwen.testing.compare import assert_close_to_fp64
from megatron_qwen.testing.poison import poisoned_outputs, surrounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Widths around 16 bytes in each dtype, primes, and more vectors than the threads of a grid.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7,), (7, 3, 8), (5, 9), (2, 4, 127), (33, 352), (0, 4), (2, 0, 4), (3, 0)])
def test_swiglu_is_as_exact_as_plain_torch(emulation: Emulation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    emulation.set_multiprocessors(1)
    op_checks.check_swiglu(shape, dtype, "cuda")
    assert emulation.calls == ([] if 0 in shape else ["swiglu_forward", "swiglu_backward"])


def test_swiglu_in_special_cases(emulation: Emulation) -> None:
    op_checks.check_swiglu_extremes("cuda")
    op_checks.check_gradient_of_a_sum("cuda")
    op_checks.check_swiglu_offsets("cuda")


def narrow_accesses(emulation: Emulation) -> int:
    """Of the last call, without the 4 bytes of one fp32 number per row."""
    return emulation.accesses(2) + emulation.accesses(4) + emulation.accesses(8)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 8), (torch.float16, 8)])
def test_swiglu_takes_16_bytes_where_rows_allow_it(emulation: Emulation, dtype: torch.dtype, width: int) -> None:
    packed, grad = op_checks.random((3, 2 * width), dtype, seed=0), op_checks.random((3, width), dtype, seed=1)

    def counts(packed: torch.Tensor, grad: torch.Tensor) -> list[tuple[int, int]]:
        out, grad_packed = torch.empty(grad.shape, dtype=dtype), torch.empty(packed.shape, dtype=dtype)
        found = []
        for launch in (
            lambda: swiglu_cuda.launch_forward(packed, out),
            lambda: swiglu_cuda.launch_backward(grad, packed, grad_packed),
        ):
            launch()
            found.append((emulation.accesses(16), narrow_accesses(emulation)))
        return found

    assert counts(packed, grad) == [(3 * 3, 0), (3 * 5, 0)]
    assert counts(surrounded(packed), surrounded(grad)) == [(3 * 3, 0), (3 * 5, 0)]
    scalar = [(0, 3 * 3 * width), (0, 3 * 5 * width)]
    assert counts(shifted(packed), grad) == scalar  # starts beside a multiple of 16 bytes
    assert counts(torch.cat([packed, packed[:, :1]], 1)[:, :-1], grad) == scalar  # rows do, all but the first
    assert counts(packed, shifted(grad))[1] == scalar[1]
    odd = [torch.cat([x, x[:, :2]], 1) for x in (packed, grad[:, : width - 1])]
    assert counts(*odd)[0][0] == 0


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is not a multiple of 16 bytes."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view_as(tensor)


# Rows shorter than a warp, around a vector, with an idle tail, across warps; odd ones take the scalar kernel.
HIDDEN = [1, 3, 7, 8, 9, 64, 127, 128, 520, 896, 1001]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rms_norm_is_as_exact_as_plain_torch(emulation: Emulation, hidden: int, dtype: torch.dtype) -> None:
    emulation.set_multiprocessors(2)
    rows = 11  # 4 blocks fit this device
    if hidden > 1:
        op_checks.check_rms_norm((rows, hidden), dtype, "cuda")
    op_checks.check_add_rms_norm((rows, hidden), dtype, "cuda")
    assert emulation.calls[-3:] == ["rms_norm_forward", "rms_norm_backward_programs", "rms_norm_backward"]


@pytest.mark.parametrize("shape", [(7,), (1, 24), (2, 3, 24), (0, 4), (2, 0, 4)])
def test_rms_norm_of_other_shapes(emulation: Emulation, shape: tuple[int, ...]) -> None:
    op_checks.check_rms_norm(shape, torch.bfloat16, "cuda")
    op_checks.check_add_rms_norm(shape, torch.float32, "cuda")
    assert (0 in shape) == ("rms_norm_forward" not in emulation.calls)


@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [
        (8192, torch.bfloat16),
        (8200, torch.float16),
        (16384, torch.bfloat16),
        (16384, torch.float32),
        (16383, torch.half),
    ],
)
def test_rms_norm_of_long_rows(emulation: Emulation, hidden: int, dtype: torch.dtype) -> None:
    """Two ways to hold a row in registers, and two lengths at which it is read again."""
    emulation.set_multiprocessors(1)
    op_checks.check_add_rms_norm((3, hidden), dtype, "cuda")


@pytest.mark.parametrize(
    "check",
    [
        op_checks.check_rms_norm_of_another_weight_dtype,
        op_checks.check_rms_norm_of_one_column,
        op_checks.check_rms_norm_rows,
        op_checks.check_gradients_of_single_outputs,
        op_checks.check_same_bits_again,
        op_checks.check_rms_norm_offsets,
    ],
)
def test_rms_norm_in_special_cases(emulation: Emulation, check) -> None:
    check("cuda")


@pytest.mark.parametrize("hidden", [24, 25])
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weights_of_any_dtype(emulation: Emulation, weight_dtype: torch.dtype, hidden: int) -> None:
    x, weight = op_checks.random((5, hidden), torch.float32, seed=0), op_checks.random((hidden,), weight_dtype, seed=1)
    grad = op_checks.random((5, hidden), torch.float32, seed=2)
    with ops.use_backend("cuda"):
        ours = op_checks.results(op_checks.rms_norm, [x, weight], [grad])
    plain = op_checks.results(op_checks.plain_rms_norm, [x, weight.float()], [grad])
    exact = op_checks.results(op_checks.plain_rms_norm, [x.double(), weight.double()], [grad.double()])
    for mine, simple, true in zip(ours, plain, exact, strict=True):
        assert_close_to_fp64(mine, simple.to(mine.dtype), true)


def test_a_weight_in_fp64_is_refused(emulation: Emulation) -> None:
    with ops.use_backend("cuda"), pytest.raises(ValueError, match=r"weight has dtype torch\.float64, and kernels take"):
        ops.rms_norm(torch.zeros(2, 8), torch.ones(8, dtype=torch.float64), eps=1e-6)


@pytest.mark.parametrize(("dtype", "hidden"), [(torch.float32, 8), (torch.bfloat16, 16), (torch.float16, 16)])
@pytest.mark.parametrize("adds", [False, True])
def test_rms_norm_takes_16_bytes_where_rows_allow_it(
    emulation: Emulation, dtype: torch.dtype, hidden: int, adds: bool
) -> None:
    emulation.set_multiprocessors(2)
    rows, vectors, tensors = 6, 2, 1 + adds
    x, grad = (op_checks.random((rows, hidden), dtype, seed=seed) for seed in (0, 1))
    weight = op_checks.random((hidden,), dtype, seed=2)

    def counts(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[tuple[int, int]]:
        y, total, grad_x = (torch.empty((rows, hidden), dtype=dtype) for _ in range(3))
        inverse_rms, grad_weight = torch.empty(rows), torch.empty_like(weight)
        sums = (x, total) if adds else (None, None)
        rms_norm_cuda.launch_forward(x, sums[0], weight, 1e-6, y, sums[1], inverse_rms)
        found = [(emulation.accesses(16), narrow_accesses(emulation))]
        rms_norm_cuda.launch_backward(grad, grad if adds else None, x, weight, inverse_rms, grad_x, grad_weight)
        return [*found, (emulation.accesses(16), narrow_accesses(emulation))]

    # Forward: x, residual, sum, weight, y; every thread of a block asks for r, one writes it.
    # Backward: grad, grad of sum, x, weight twice, grad_x; per program a row of partial; column_sum reads that.
    programs, threads = 4, 32
    forward = rows * vectors * (2 * tensors + 1), rows
    partial = programs * hidden
    backward = rows * vectors * (5 + adds) + partial // 4, rows * threads + partial + hidden
    assert counts(x, weight, grad) == [forward, backward]
    assert counts(surrounded(x), weight, grad) == [forward, backward]
    assert [wide for wide, _ in counts(shifted(x), weight, grad)] == [0, 0]
    assert [wide for wide, _ in counts(x, shifted(weight), grad)] == [0, 0]
    assert counts(x, weight, shifted(grad))[1][0] == 0


def test_programs_share_rows_and_are_few(emulation: Emulation) -> None:
    emulation.set_multiprocessors(2)

    def programs(rows: int, hidden: int, dtype: str = "bfloat16") -> int:
        return emulation.module.rms_norm_backward_programs(rows=rows, hidden=hidden, dtype=dtype, adds=True)

    assert [programs(rows, 896) for rows in (0, 1, 3, 4, 1000)] == [0, 1, 3, 4, 4]
    assert programs(1000, 16384, "float32") == 4
    for hidden in (0, 16385):
        with pytest.raises(ValueError, match=f"hidden = {hidden}; expected"):
            programs(1, hidden)


def test_kernels_agree_whatever_the_number_of_programs(emulation: Emulation) -> None:
    """Partial sums of one row each, or of many: the same gradient up to the order of additions."""
    x, grad = (op_checks.random((9, 40), torch.float32, seed=seed) for seed in (0, 1))
    weight, results = torch.ones(40), []
    for count in (1, 2, 100):
        emulation.set_multiprocessors(count)
        with ops.use_backend("cuda"), poisoned_outputs():
            results.append(op_checks.results(op_checks.rms_norm, [x, weight], [grad]))
    inverse_rms = rms_norm_reference.forward(x, weight, op_checks.EPS)[1]
    expected = rms_norm_reference.backward(grad, x, weight, inverse_rms, None)[1]
    for y, grad_x, grad_weight in results:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])
        torch.testing.assert_close(grad_weight, expected)


SWIGLU = {
    "packed": 0x1000, "grad": 0x3000, "out": 0x5000, "grad_packed": 0x7000, "rows": 2, "width": 8,
    "packed_stride": 16, "grad_stride": 8, "dtype": "bfloat16",
}  # fmt: skip
SWIGLU_FORWARD = ("packed", "out", "rows", "width", "packed_stride", "dtype")
SWIGLU_BACKWARD = ("grad", "packed", "grad_packed", "rows", "width", "grad_stride", "packed_stride", "dtype")
NORM = {
    "x": 0x1000, "residual": 0x2000, "weight": 0x3000, "y": 0x4000, "sum": 0x5000, "inverse_rms": 0x6000,
    "grad": 0x7000, "grad_sum": 0x8000, "grad_x": 0x9000, "grad_weight": 0xA000, "partial": 0xB000, "rows": 2,
    "hidden": 8, "x_stride": 8, "residual_stride": 8, "eps": 1e-6, "num_programs": 2, "dtype": "float16",
    "weight_dtype": "float32",
}  # fmt: skip
NORM_FORWARD = (
    "x", "residual", "weight", "y", "sum", "inverse_rms", "rows", "hidden", "x_stride", "residual_stride", "eps",
    "dtype", "weight_dtype",
)  # fmt: skip
NORM_BACKWARD = (
    "grad", "grad_sum", "x", "weight", "inverse_rms", "grad_x", "grad_weight", "partial", "rows", "hidden", "x_stride",
    "num_programs", "dtype", "weight_dtype",
)  # fmt: skip
BAD_SWIGLU = [
    ({"rows": -1}, "rows = -1; expected 0 or more"),
    ({"width": -8}, "width = -8; expected 0 or more"),
    ({"rows": 2**58}, "rows = 288230376151711744; expected at most"),
    ({"packed_stride": -16}, "packed_stride = -16; expected 0 or more"),
    ({"packed": 0}, "packed is a null pointer"),
    ({"packed": 0x1001}, "packed = 0x1001 is not a multiple of 2 bytes"),
    ({"dtype": "float64"}, 'dtype is "float64"; expected float32, bfloat16 or float16'),
]
BAD_NORM = [
    ({"rows": -1}, "rows = -1; expected 0 or more"),
    ({"rows": 2**41}, "rows = 2199023255552; expected at most"),
    ({"hidden": 0}, "hidden = 0; expected 1 or more"),
    ({"hidden": 16385}, "hidden = 16385; expected at most 16384"),
    ({"x_stride": -1}, "x_stride = -1; expected 0 or more"),
    ({"x": 0}, "x is a null pointer"),
    ({"x": 0x1001}, "x = 0x1001 is not a multiple of 2 bytes"),
    ({"weight": 0x3002}, "weight = 0x3002 is not a multiple of 4 bytes"),
    ({"inverse_rms": 0x6002}, "inverse_rms = 0x6002 is not a multiple of 4 bytes"),
    ({"weight_dtype": "int8"}, 'weight_dtype is "int8"; expected float32'),
]


@pytest.mark.parametrize(
    ("function", "names", "defaults", "changes", "words"),
    [
        *(("swiglu_forward", SWIGLU_FORWARD, SWIGLU, *bad) for bad in BAD_SWIGLU),
        ("swiglu_forward", SWIGLU_FORWARD, SWIGLU, {"out": 0}, "out is a null pointer"),
        *(("swiglu_backward", SWIGLU_BACKWARD, SWIGLU, *bad) for bad in BAD_SWIGLU),
        ("swiglu_backward", SWIGLU_BACKWARD, SWIGLU, {"grad": 0}, "grad is a null pointer"),
        ("swiglu_backward", SWIGLU_BACKWARD, SWIGLU, {"grad_packed": 0}, "grad_packed is a null pointer"),
        ("swiglu_backward", SWIGLU_BACKWARD, SWIGLU, {"grad_stride": -1}, "grad_stride = -1; expected 0"),
        *(("rms_norm_forward", NORM_FORWARD, NORM, *bad) for bad in BAD_NORM),
        ("rms_norm_forward", NORM_FORWARD, NORM, {"eps": -1.0}, "eps = -1; expected 0 or more"),
        ("rms_norm_forward", NORM_FORWARD, NORM, {"eps": float("nan")}, "eps = nan; expected 0 or more"),
        ("rms_norm_forward", NORM_FORWARD, NORM, {"y": 0}, "y is a null pointer"),
        ("rms_norm_forward", NORM_FORWARD, NORM, {"sum": 0}, "sum is a null pointer"),
        ("rms_norm_forward", NORM_FORWARD, NORM, {"residual": 0}, "sum is given without residual"),
        ("rms_norm_forward", NORM_FORWARD, NORM, {"residual_stride": -1}, "residual_stride = -1; expected 0"),
        *(("rms_norm_backward", NORM_BACKWARD, NORM, *bad) for bad in BAD_NORM),
        ("rms_norm_backward", NORM_BACKWARD, NORM, {"grad": 0}, "grad is a null pointer"),
        ("rms_norm_backward", NORM_BACKWARD, NORM, {"grad_sum": 1}, "grad_sum = 0x1 is not a multiple of 2 bytes"),
        ("rms_norm_backward", NORM_BACKWARD, NORM, {"grad_x": 0}, "grad_x is a null pointer"),
        ("rms_norm_backward", NORM_BACKWARD, NORM, {"grad_weight": 0}, "grad_weight is a null pointer"),
        ("rms_norm_backward", NORM_BACKWARD, NORM, {"partial": 0xB008}, "partial = 0xb008 is not a multiple of 16"),
        ("rms_norm_backward", NORM_BACKWARD, NORM, {"num_programs": 0}, "num_programs = 0; expected 1 or more"),
        ("rms_norm_backward", NORM_BACKWARD, NORM, {"num_programs": 3}, "num_programs = 3; expected at most 2"),
    ],
)
def test_bad_parameters_are_named(emulation: Emulation, function, names, defaults, changes, words: str) -> None:
    arguments = {name: defaults[name] for name in names}
    with pytest.raises(ValueError, match=f"{function}: {words}"):
        getattr(emulation.module, function)(**(arguments | changes))


def test_nothing_to_do_looks_at_no_pointer(emulation: Emulation) -> None:
    for function, names, defaults in (
        ("swiglu_forward", SWIGLU_FORWARD, SWIGLU),
        ("swiglu_backward", SWIGLU_BACKWARD, SWIGLU),
        ("rms_norm_forward", NORM_FORWARD, NORM),
        ("rms_norm_backward", NORM_BACKWARD, NORM),
    ):
        getattr(emulation.module, function)(**({name: defaults[name] for name in names} | {"rows": 0}))
        assert emulation.accesses(16) + narrow_accesses(emulation) == 0
