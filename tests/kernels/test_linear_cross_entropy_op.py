"""`linear_cross_entropy` by its reference, and as an operation of torch."""

from __future__ import annotations

import linear_cross_entropy_checks as checks
import op_checks
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.linear_cross_entropy import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "hidden", "rows"), [((1,), 1, 1), ((0,), 8, 5), ((7, 3), 24, 101), ((64,), 32, 512)])
def test_reference_is_as_exact_as_logits_held_whole(lead, hidden: int, rows: int, dtype: torch.dtype) -> None:
    checks.check(lead, hidden, rows, dtype, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_in_several_chunks_with_padding(dtype: torch.dtype) -> None:
    checks.check_in_small_chunks((5, 2), 101, dtype, "reference")
    checks.check_in_small_chunks((1,), 43, dtype, "reference")
    checks.check((6,), 16, 53, dtype, "reference", z_loss=0.1)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_all_ignored,
        checks.check_extreme_logits,
        checks.check_same_bits_again,
        checks.check_terms,
        checks.check_offsets,
        checks.check_label_out_of_range,
    ],
)
def test_reference_in_special_cases(check) -> None:
    check("reference")


def test_a_chunk_is_bounded_and_all_rows_are_walked_once() -> None:
    for tokens, rows in [(1, 7), (1024, 151_936), (100_000, 151_936), (0, 5)]:
        parts = list(reference.chunks(tokens, rows, 1 << 23, 1024))
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == rows
        largest = max(part.stop - part.start for part in parts)
        assert largest * tokens <= max(1 << 23, 1024 * tokens)
    assert not list(reference.chunks(5, 0, 1 << 23, 1024))


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that forward and backward make is the gradient of the weight, not [tokens, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 10)
    monkeypatch.setattr(reference, "SMALLEST_CHUNK", 16)
    sizes: list[int] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(each))
            return out

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    with Record():
        ops.linear_cross_entropy(hidden, weight, torch.arange(64)).sum().backward()
    assert max(sizes) == 8000 < 64 * 1000


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight = (torch.randn(shape, 5, dtype=torch.float64, requires_grad=True) for shape in (4, 11))
    labels = torch.tensor([0, -100, 8, 3])
    for z_loss in (0.0, 0.3):
        assert torch.autograd.gradcheck(
            lambda h, w, z=z_loss: ops.linear_cross_entropy(h, w, labels, vocab_size=9, z_loss=z), (hidden, weight)
        )


def test_operation_is_registered_as_torch_wants_it() -> None:
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    labels = torch.randint(-1, 13, (2, 3))
    library = torch.ops.megatron_qwen
    torch.library.opcheck(library.linear_cross_entropy.default, (hidden, weight, labels, 13))
    hidden, weight = hidden.detach(), weight.detach()
    lse, label_logit = library.linear_cross_entropy(hidden, weight, labels, 11)
    torch.library.opcheck(
        library.linear_cross_entropy_backward.default, (lse, label_logit, hidden, weight, labels, lse, 11)
    )


def test_a_second_derivative_is_refused() -> None:
    hidden, weight = torch.randn(2, 4, requires_grad=True), torch.ones(3, 4)
    loss = ops.linear_cross_entropy(hidden, weight, torch.zeros(2, dtype=torch.int64)).sum()
    with pytest.raises(RuntimeError, match="linear_cross_entropy_backward has no gradient"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def head(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (ops.linear_cross_entropy(hidden * 2.0, weight, labels, z_loss=1e-3) * 0.5).sum()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiles_as_one_graph_with_equal_results(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend=backend)
    weight = torch.randn(17, 16, requires_grad=True)
    for tokens in (3, 5):
        hidden, labels = torch.randn(tokens, 16, requires_grad=True), torch.arange(tokens)
        eager, graph = head(hidden, weight, labels), compiled(hidden, weight, labels)
        torch.testing.assert_close(graph, eager)
        expected = torch.autograd.grad(eager, [hidden, weight])
        torch.testing.assert_close(torch.autograd.grad(graph, [hidden, weight]), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool) -> None:
    hidden, weight = torch.randn(3, 16, requires_grad=True), torch.randn(17, 16, requires_grad=True)
    labels = torch.tensor([4, -100, 16])
    kept = torch.autograd.grad(head(hidden, weight, labels), [hidden, weight])
    torch.utils.checkpoint.checkpoint(head, hidden, weight, labels, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, kept[0])
    assert torch.equal(weight.grad, kept[1])


def test_hidden_states_of_any_strides_and_int32_labels() -> None:
    hidden, weight = torch.randn(3, 5, 8), torch.randn(11, 8)
    labels = torch.randint(0, 11, (5, 3), dtype=torch.int32)
    mine = ops.linear_cross_entropy(hidden.transpose(0, 1), weight, labels)
    assert torch.equal(mine, ops.linear_cross_entropy(hidden.transpose(0, 1).contiguous(), weight, labels.long()))
    torch.testing.assert_close(mine, checks.plain(hidden.transpose(0, 1).contiguous(), weight, labels, 11))


class Recorder:
    """Takes the weight's gradient into a buffer that is already there, as Megatron's main_grad is."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer

    def add(self, rows: slice, grad_logits: torch.Tensor, hidden: torch.Tensor) -> None:
        self.buffer[rows].addmm_(grad_logits.t(), hidden)

    def result(self) -> torch.Tensor | None:
        return None


def test_the_gradient_of_the_weight_may_go_into_a_buffer_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(reference, "SMALLEST_CHUNK", 4)
    (hidden, weight), labels, (grad,) = checks.example((6, 2), 16, 29, 29, torch.float32)
    expected = op_checks.results(lambda h, w: ops.linear_cross_entropy(h, w, labels), [hidden, weight], [grad])
    buffer = torch.ones(29, 16)
    hidden.requires_grad_(), weight.requires_grad_()
    ops.linear_cross_entropy(hidden, weight, labels, weight_gradient=Recorder(buffer)).backward(grad)
    assert weight.grad is None
    assert torch.equal(hidden.grad, expected[1])
    torch.testing.assert_close(buffer - 1.0, expected[2])


H, W, Y = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((H.int(), W, Y), {}, "hidden has dtype torch.int32"),
        ((torch.tensor(1.0), W, Y), {}, "hidden is a scalar"),
        ((H, torch.zeros(5, 3), Y), {}, r"weight has shape \(5, 3\); expected \(rows, 4\)"),
        ((H, torch.zeros(4), Y), {}, r"weight has shape \(4,\)"),
        ((H, torch.zeros(0, 4), Y), {}, r"weight has shape \(0, 4\)"),
        ((H, W.double(), Y), {}, "weight has dtype torch.float64; expected torch.float32"),
        ((H, W.to("meta"), Y), {}, "weight is on meta; expected cpu, where hidden is"),
        ((H, W, Y.float()), {}, "labels has dtype torch.float32; expected torch.int64 or torch.int32"),
        ((H, W, Y[:1]), {}, r"labels has shape \(1,\); expected \(2,\)"),
        ((H, W, Y.to("meta")), {}, "labels is on meta"),
        ((H, W, torch.tensor([0, 5])), {}, r"labels holds 5 \(1 such labels\); expected 0 to 4, or -100"),
        ((H, W, torch.tensor([-1, -2])), {}, r"labels holds -1 \(2 such labels\)"),
        ((H, W, torch.tensor([0, 4])), {"vocab_size": 4}, "labels holds 4"),
        ((H, W, Y), {"vocab_size": 6}, "vocab_size is 6; expected 1 to 5"),
        ((H, W, Y), {"vocab_size": 0}, "vocab_size is 0"),
        ((H, W, Y), {"z_loss": -1.0}, "z_loss is -1.0; expected a finite number, 0 or more"),
        ((H, W, Y), {"z_loss": float("nan")}, "z_loss is nan"),
        ((H[0], W, torch.tensor(0)), {"sequence_parallel": True}, "expected an axis to gather along"),
    ],
)
def test_bad_input_is_named(arguments, options, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ops.linear_cross_entropy(*arguments, **options)
