"""Real ranks over gloo: groups, random streams, uneven collectives, and peers that go away."""

from __future__ import annotations

import functools
import os
import signal
import time

import psutil
import pytest

from megatron_qwen.errors import ConfigError, RankFailure
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import run_ranks

pytestmark = pytest.mark.multirank


def visit_every_axis() -> tuple[ParallelLayout, list[float], list[float], tuple[int, ...]]:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_qwen.parallel import groups

    layout = groups.initialize(ParallelLayout(tp=2), timeout_seconds=60)
    assert groups.initialize(ParallelLayout(tp=2)) == layout, "idempotent"
    with pytest.raises(ConfigError, match="already runs"):
        groups.initialize(ParallelLayout(pp=2))
    total = torch.ones(1)
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    common = torch.rand(3).tolist()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        own = torch.rand(3).tolist()
    place = (groups.rank(), groups.world_size(), int(total.item()), groups.is_last_stage(), groups.is_rank_zero())
    groups.shutdown()
    assert not dist.is_initialized()
    return layout, common, own, place


def test_ranks_form_the_layout_and_draw_their_streams() -> None:
    (layout, common0, own0, place0), (_, common1, own1, place1) = run_ranks(visit_every_axis, 2)
    assert layout.dp == 1
    assert (place0, place1) == ((0, 2, 2, True, True), (1, 2, 2, True, False))
    assert common0 == common1, "outside the fork, tensor-parallel ranks must drop the same activations"
    assert own0 != own1, "inside, each rank has a stream of its own"


def gather_unequal_shares() -> tuple[list[list[float]], list[float]]:
    import torch

    from megatron_qwen.parallel import groups

    groups.initialize(ParallelLayout(tp=2), timeout_seconds=60)
    from megatron.core.tensor_parallel import mappings

    rows = (1, 3)
    mine = torch.full((rows[groups.rank()], 2), float(groups.rank() + 1), requires_grad=True)
    gathered = mappings.gather_from_sequence_parallel_region(mine, output_split_sizes=list(rows))
    (gathered * torch.arange(4.0)[:, None]).sum().backward()
    return gathered.tolist(), mine.grad[:, 0].tolist()


def test_unequal_shares_gather_and_their_gradients_scatter() -> None:
    for rank, (gathered, gradient) in enumerate(run_ranks(gather_unequal_shares, 2)):
        assert gathered == [[1, 1], [2, 2], [2, 2], [2, 2]]
        assert gradient == ([0], [2, 4, 6])[rank], "each of the two ranks contributes the same loss"


def lose_a_peer(how: int) -> float:
    import torch
    import torch.distributed as dist

    from megatron_qwen.parallel import groups

    groups.initialize(ParallelLayout(), timeout_seconds=4)
    dist.all_reduce(torch.ones(1))
    if groups.rank() == 1:
        os.kill(os.getpid(), how)
    start = time.monotonic()
    try:
        with groups.collectives():
            dist.all_reduce(torch.ones(1))
    except RankFailure as error:
        raise RankFailure(f"{error} after {time.monotonic() - start:.1f}") from None
    raise AssertionError("the collective went through without its peer")


def test_a_stopped_peer_fails_the_collective_within_its_timeout() -> None:
    with pytest.raises(RankFailure, match=r"lost a peer in a collective") as caught:
        run_ranks(functools.partial(lose_a_peer, int(signal.SIGSTOP)), 2)
    assert 3 < float(str(caught.value).rsplit(" ", 1)[1]) < 30


def test_a_killed_peer_is_named() -> None:
    with pytest.raises(RankFailure, match=r"rank 1 of 2 ended with status -9|rank 0 of 2 lost a peer"):
        run_ranks(functools.partial(lose_a_peer, int(signal.SIGKILL)), 2)


def alone() -> tuple[int, int, int | None]:
    from megatron_qwen.parallel import groups

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    layout = groups.initialize(ParallelLayout())
    connections = [each for each in psutil.Process().net_connections() if each.status == "LISTEN"]
    return groups.world_size(), len(connections), layout.dp


def test_one_rank_needs_no_launcher() -> None:
    size, _, dp = run_ranks(alone, 1)[0]
    assert (size, dp) == (1, 1)


def raise_on(rank: int) -> str:
    if int(os.environ["RANK"]) == rank:
        raise ConfigError("this rank has no data")
    time.sleep(60)
    return "not reached"


def nothing() -> None:
    """What a rank has to do of which nothing is asked."""


def test_an_exception_comes_back_with_its_traceback_and_nobody_stays() -> None:
    run_ranks(nothing, 1)  # starts the server that ranks are forked from
    start = time.monotonic()
    before = psutil.Process().children(recursive=True)
    with pytest.raises(ConfigError, match="this rank has no data") as caught:
        run_ranks(functools.partial(raise_on, 1), 2)
    assert "rank 1 raised" in str(caught.value.__cause__)
    assert "in raise_on" in str(caught.value.__cause__)
    assert time.monotonic() - start < 50
    assert set(psutil.Process().children(recursive=True)) <= set(before)


def hang() -> None:
    time.sleep(600)


def test_time_out_kills_the_ranks() -> None:
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] of 2 were still running after 2 s"):
        run_ranks(hang, 2, timeout=2)
