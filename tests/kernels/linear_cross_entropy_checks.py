"""Checks of `linear_cross_entropy` for any backend, in the manner of op_checks.py."""

from __future__ import annotations

import importlib

import op_checks
import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.testing.compare import assert_relative

IGNORED = -100


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, vocab: int, z_loss: float = 0.0
) -> torch.Tensor:
    """The definition: logits of the inputs' dtype held whole, softmax in fp32."""
    logits = hidden @ weight[:vocab].t()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).view(-1, vocab)
    loss = functional.cross_entropy(logits, labels.reshape(-1).long(), ignore_index=IGNORED, reduction="none")
    lse = torch.where(labels.reshape(-1) == IGNORED, 0.0, logits.logsumexp(-1))
    return (loss + z_loss * lse.square()).view(labels.shape)


def example(
    lead: tuple[int, ...], hidden_size: int, rows: int, vocab: int, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """Hidden states and weight, labels (the last of three is ignored), and a gradient per token, some of them zero."""
    hidden = op_checks.random((*lead, hidden_size), dtype, seed=0)
    weight = op_checks.random((rows, hidden_size), dtype, seed=1, scale=2.0 * hidden_size**-0.5)
    labels = torch.randint(0, vocab, lead, generator=torch.Generator().manual_seed(2))
    labels.view(-1)[2::3] = IGNORED
    grad = op_checks.random(lead, torch.promote_types(dtype, torch.float32), seed=3)
    grad.view(-1)[1::5] = 0.0
    return [hidden, weight], labels, [grad]


def check(
    lead: tuple[int, ...],
    hidden_size: int,
    rows: int,
    dtype: torch.dtype,
    backend: str,
    *,
    vocab: int | None = None,
    z_loss: float = 0.0,
) -> None:
    counted = vocab or rows
    inputs, labels, grads = example(lead, hidden_size, rows, counted, dtype)

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, vocab_size=vocab, z_loss=z_loss)

    def plainly(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return plain(hidden, weight, labels, counted, z_loss)

    op_checks.check_against_fp64(ours, plainly, inputs, grads, backend)


def check_in_small_chunks(lead: tuple[int, ...], rows: int, dtype: torch.dtype, backend: str) -> None:
    """Chunks of a few rows, so that a small vocabulary has several, the last one shorter."""
    folder = "megatron_qwen.kernels.linear_cross_entropy."
    module = importlib.import_module(folder + ("kernel" if backend == "triton" else "reference"))
    sizes = module.CHUNK_ELEMENTS, module.SMALLEST_CHUNK
    module.CHUNK_ELEMENTS, module.SMALLEST_CHUNK = 64, 8
    try:
        check(lead, 24, rows, dtype, backend, vocab=rows - 2)
    finally:
        module.CHUNK_ELEMENTS, module.SMALLEST_CHUNK = sizes


def check_all_ignored(backend: str) -> None:
    inputs, labels, _ = example((4, 3), 16, 37, 37, torch.float32)
    labels.fill_(IGNORED)
    with ops.use_backend(backend):
        loss, grad_hidden, grad_weight = op_checks.results(
            lambda h, w: ops.linear_cross_entropy(h, w, labels, z_loss=0.1), inputs, [torch.ones(4, 3)]
        )
    assert (loss == 0).all()
    assert (grad_hidden == 0).all()
    assert (grad_weight == 0).all()


def check_extreme_logits(backend: str) -> None:
    """Logits of +-1e4 give losses of that size, not NaN; a NaN stays in its token."""
    hidden = torch.tensor([[1e4], [-1e4], [1.0], [float("nan")]])
    weight, labels = torch.tensor([[1.0], [-1.0], [0.5]]), torch.tensor([1, 1, 2, 0])
    with ops.use_backend(backend):
        loss = ops.linear_cross_entropy(hidden, weight, labels)
    expected = functional.cross_entropy(hidden[:3] @ weight.t(), labels[:3], reduction="none")
    torch.testing.assert_close(loss[:3], expected)
    assert loss[3].isnan()


def check_same_bits_again(backend: str) -> None:
    inputs, labels, grads = example((67,), 48, 301, 301, torch.bfloat16)
    with ops.use_backend(backend):
        once, again = (
            op_checks.results(lambda h, w: ops.linear_cross_entropy(h, w, labels), inputs, grads) for _ in range(2)
        )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def check_terms(backend: str) -> None:
    (hidden, weight), labels, _ = example((9,), 16, 37, 37, torch.float32)
    with ops.use_backend(backend):
        terms = ops.linear_cross_entropy_terms(hidden.requires_grad_(), weight, labels, z_loss=0.25)
        alone = ops.linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(terms.cross_entropy, alone)
    assert not terms.cross_entropy.requires_grad
    assert_relative(terms.loss, alone + 0.25 * terms.log_sum_exp.square(), 1e-6)
    assert_relative(terms.loss, plain(hidden, weight, labels, 37, 0.25), 1e-6)


def check_offsets(backend: str) -> None:
    """Rows 2^30 elements apart, of hidden and of weight."""
    hidden, weight = op_checks.rows_beyond_32_bits(12), op_checks.rows_beyond_32_bits(12)
    hidden.copy_(op_checks.random((3, 12), torch.bfloat16, seed=0))
    weight.copy_(op_checks.random((3, 12), torch.bfloat16, seed=1))
    labels, grad = torch.tensor([0, 1, 2]), op_checks.random((3,), torch.float32, seed=2)

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels)

    with ops.use_backend(backend):
        losses = [ours(h, w) for h in (hidden, hidden.contiguous()) for w in (weight, weight.contiguous())]
        far = op_checks.results(lambda h: ours(h, weight), [hidden], [grad])
        near = op_checks.results(lambda h: ours(h, weight.contiguous()), [hidden.contiguous()], [grad])
    assert all(torch.equal(loss, losses[-1]) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def check_label_out_of_range(backend: str) -> None:
    """The kernels' way, taken where the labels are not looked at: NaN for such a token, and no gradient."""
    (hidden, weight), _, grads = example((3,), 16, 37, 37, torch.float32)
    labels = torch.tensor([36, 37, -1])
    compiled = torch.compile(lambda h, w: ops.linear_cross_entropy(h, w, labels), backend="eager", fullgraph=True)
    with ops.use_backend(backend):
        loss, grad_hidden, grad_weight = op_checks.results(compiled, [hidden, weight], grads)
    assert loss.isnan().tolist() == [False, True, True]
    assert (grad_hidden[1:] == 0).all()
    assert torch.isfinite(grad_weight).all()
