from __future__ import annotations

import pytest
import torch

from megatron_qwen.testing.poison import GUARD, poisoned_outputs, surrounded


def test_what_is_not_written_is_nan() -> None:
    with poisoned_outputs():
        x = torch.empty(3, 4)
        assert x.isnan().all()
        assert x.new_empty(2, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).min).all()
    assert torch.empty.__module__ != __name__


@pytest.mark.parametrize(("position", "where"), [(-1, "before"), (6, "behind")])
def test_a_write_outside_is_found(position: int, where: str) -> None:
    def write_outside() -> None:
        with poisoned_outputs():
            out = torch.empty(2, 3)
            out.as_strided((1,), (1,), out.storage_offset() + position).fill_(1.0)

    with pytest.raises(AssertionError, match=f"1 elements written {where} an output of 6"):
        write_outside()


def test_the_functions_come_back_after_an_error() -> None:
    before = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with pytest.raises(ZeroDivisionError), poisoned_outputs():
        _ = 1 / 0
    assert (torch.empty, torch.empty_like, torch.Tensor.new_empty) == before


def test_surrounded_keeps_values_and_puts_nan_after_every_row() -> None:
    x = torch.arange(30.0).view(2, 3, 5)
    framed = surrounded(x)
    assert torch.equal(framed, x)
    assert framed.stride() == (3 * (5 + GUARD), 5 + GUARD, 1)
    assert framed.as_strided((2, 3, 6), framed.stride(), framed.storage_offset())[..., 5].isnan().all()
    assert framed.as_strided((1,), (1,), framed.storage_offset() - 1).isnan().all()
