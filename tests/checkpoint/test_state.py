"""Run records: what a resume compares, and how it says what differs."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from megatron_qwen.checkpoint.state import check_same_run, run_record
from megatron_qwen.errors import ConfigError, MismatchError
from megatron_qwen.parallel.layout import ParallelLayout

IDENTITY = {
    "seed": 1234,
    "model": {"hidden_size": 64, "layers": [1, 2, 3]},
    "data": {"blend": [[0.1, "a"], [0.9, "b"]]},
}


def record(**changes: Any) -> dict[str, Any]:
    return run_record(identity={**IDENTITY, **changes}, layout=ParallelLayout(tp=2, dp=1, pp_layout=(1, 2)))


def test_equal_runs_resume_exactly_whatever_json_does_to_tuples() -> None:
    assert record()["layout"]["pp_layout"] == [1, 2]
    assert check_same_run(record(), record()) == []


def test_every_difference_is_listed_with_both_values() -> None:
    present = record(seed=7, model={"hidden_size": 64, "layers": [1, 5, 3], "bias": True}, data={"blend": [[1.0, "a"]]})
    with pytest.raises(MismatchError) as caught:
        check_same_run(record(), present)
    for line in (
        "seed: saved 1234, now 7",
        "model.layers[1]: saved 2, now 5",
        "model.bias: saved None, now True",
        "data.blend: saved [[0.1, 'a'], [0.9, 'b']], now [[1.0, 'a']]",
        "--allow-changed data,model,seed",
    ):
        assert line in str(caught.value)


def test_allowed_differences_become_reasons() -> None:
    present = record(seed=7)
    assert check_same_run(record(), present, ["seed"]) == ["seed: saved 1234, now 7"]
    with pytest.raises(MismatchError, match="seed"):
        check_same_run(record(), present, ["data"])
    with pytest.raises(ConfigError, match=r"not one of data, model, seed; did you mean model\?"):
        check_same_run(record(), present, ["modle"])


def test_layout_versions_and_device_do_not_stop_a_resume_but_are_named() -> None:
    present = copy.deepcopy(record())
    present["layout"]["tp"] = 1
    present["versions"]["torch"] = "1.0"
    present["device"] = "another"
    reasons = check_same_run(record(), present)
    assert reasons[0] == "layout.tp: saved 2, now 1"
    assert reasons[1].startswith("versions.torch: saved ")
    assert reasons[2].startswith("device: saved ")
