"""metrics.jsonl keeps every bit, forgets what a resume repeats, and lines are those that parsers know."""

from __future__ import annotations

import json
import math
import re

import pytest

from megatron_qwen.training.metrics import MetricsLog, StepMetrics, measure_gemm, read_metrics
from megatron_qwen.training.plots import plot_loss

ODD = 0.1 + 0.2


def metrics(step: int, **changes) -> StepMetrics:
    values = {
        "step": step, "samples": 16 * step, "tokens": 2048 * step, "loss": ODD / step, "aux_loss": None,
        "grad_norm": 1 / 3, "lr": 1e-5, "is_applied": True, "seconds": 0.5, "tokens_per_second": 4096.0,
        "tflops": 1.5, "mfu": 0.25,
    }  # fmt: skip
    return StepMetrics(**(values | changes))


def log(folder, first_step=0, **options) -> tuple[MetricsLog, list[str]]:
    lines: list[str] = []
    options = {"log_every": 1, "tensorboard": False, **options}
    return MetricsLog(folder, first_step=first_step, steps=9, echo=lines.append, **options), lines


def test_floats_come_back_bit_for_bit(tmp_path):
    written, _ = log(tmp_path)
    written.write(metrics(1, loss=ODD, valid_loss=math.pi))
    written.write(metrics(2, loss=math.nan, is_applied=False))
    written.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["grad_norm"], first["valid_loss"]) == (ODD, 1 / 3, math.pi)
    assert math.isnan(second["loss"])


def test_a_resume_forgets_later_steps_and_a_cut_line(tmp_path):
    written, _ = log(tmp_path)
    for step in (1, 2, 3):
        written.write(metrics(step))
    written.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    again, _ = log(tmp_path, first_step=2)
    again.write(metrics(3, loss=7.0))
    again.close()
    assert [(each["step"], each["loss"]) for each in read_metrics(path)] == [(1, ODD), (2, ODD / 2), (3, 7.0)]


def test_the_progress_line_has_what_log_parsers_look_for(tmp_path):
    written, lines = log(tmp_path, log_every=3)
    for step in range(1, 7):
        written.write(metrics(step, aux_loss=2.125, is_applied=step != 5))
    written.close()
    assert [int(re.search(r"iteration +(\d+)/ +9", line)[1]) for line in lines] == [1, 3, 5, 6]
    assert re.search(r"throughput per GPU \(TFLOP/s/GPU\): 1\.5", lines[0])
    assert re.search(r"elapsed time per iteration \(ms\): 500\.0", lines[0])
    assert re.search(r"lm loss: 0\.3000 \| aux loss: 2\.1250", lines[0])
    assert "NOT APPLIED" in lines[2]
    assert "NOT APPLIED" not in lines[1]


def test_tensorboard_events_hold_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written, _ = log(tmp_path, tensorboard=True)
    written.write(metrics(1, loss=2.5))
    written.write(metrics(2, loss=1.25))
    written.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]


def test_the_loss_curve_is_a_picture(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 5 / step}) + "\n" for step in range(1, 30)))
    plot_loss(path, tmp_path / "loss.png", unigram_entropy=4.5, title="run")
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    plot_loss(path, tmp_path / "loss.png", title="run")
    assert (tmp_path / "loss.png").read_bytes() != picture
    assert sorted(each.name for each in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_the_measured_peak_is_a_plausible_speed():
    import torch

    assert 1e-4 < measure_gemm(torch.float32, size=256, seconds=0.01) < 1e4
