"""The CPU platform: what megatron.* modules see, and that nobody else sees anything."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_qwen.parallel.device import communication_backend, current_device, device_name, install_cpu_platform

ROOT = Path(__file__).parents[2]
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is for machines without CUDA")


def python(code: str, *arguments: str, cwd: Path) -> str:
    """Run code in a clean interpreter and return what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_names_the_device() -> None:
    assert device_name().strip()
    assert current_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert communication_backend() == ("nccl" if torch.cuda.is_available() else "gloo")


@cpu_only
def test_import_touches_nothing(tmp_path: Path) -> None:
    out = python(
        """
        import sys, torch
        before = dict(vars(torch)), dict(vars(torch.cuda)), dict(vars(torch.Tensor)), list(sys.meta_path)
        import megatron_qwen.parallel.device, megatron_qwen.parallel.groups
        assert all(vars(torch)[k] is v for k, v in before[0].items())
        assert all(vars(torch.cuda)[k] is v for k, v in before[1].items())
        assert all(vars(torch.Tensor)[k] is v for k, v in before[2].items())
        print("same")
        """,
        cwd=tmp_path,
    )
    assert out.strip() == "same"


@cpu_only
def test_torch_stays_truthful_for_everybody_else() -> None:
    real = {name: getattr(torch, name) for name in ("zeros", "compile", "load", "cuda", "distributed")}
    assert install_cpu_platform()
    assert install_cpu_platform(), "idempotent"
    for name, value in real.items():
        assert getattr(torch, name) is value, name
    assert not torch.cuda.is_available()
    for call in (
        lambda: torch.ones(1).to("cuda"),
        lambda: torch.ones(1).cuda(),
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.nn.Linear(1, 1).cuda(),
        torch.cuda.current_device,
    ):
        with pytest.raises((RuntimeError, AssertionError)):
            call()
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64


@cpu_only
def test_megatron_modules_see_the_stand_in() -> None:
    install_cpu_platform()
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.tensor_parallel import mappings, random

    for module in (clip_grads, optimizer, random, mappings):
        assert module.torch is not torch
        assert module.torch.cuda.current_device() == torch.device("cpu")
        assert module.torch.zeros(2, device="cuda").device.type == "cpu"
        assert module.torch.nn is torch.nn
        assert module.torch.Tensor is torch.Tensor
    generator_state = torch.get_rng_state()
    random._set_cuda_rng_state(generator_state)
    assert torch.equal(random._get_cuda_rng_state(), generator_state)


@cpu_only
def test_tensor_methods_change_for_megatron_callers_only() -> None:
    install_cpu_platform()
    caller: dict[str, object] = {"__name__": "megatron.core.example", "torch": torch}
    exec("def kind(t): return t.type(), t.cuda() is t, t.pin_memory() is t, t.record_stream(None)", caller)
    said = caller["kind"](torch.ones(1, dtype=torch.bfloat16))  # type: ignore[operator]
    assert said == ("torch.cuda.BFloat16Tensor", True, True, None)
    namesake: dict[str, object] = {"__name__": "megatron_extras.example"}
    exec("def kind(t): return t.type()", namesake)
    assert namesake["kind"](torch.ones(1)) == "torch.FloatTensor"  # type: ignore[operator]


@cpu_only
def test_covers_modules_imported_before_the_installation(tmp_path: Path) -> None:
    out = python(
        """
        import json, torch
        import megatron.core.tensor_parallel.random as early
        import megatron.core.fusions.fused_bias_swiglu as compiled
        was_compiled = hasattr(compiled.swiglu, "_torchdynamo_orig_callable")
        from megatron_qwen.parallel.device import install_cpu_platform
        install_cpu_platform()
        import megatron.core.fusions.fused_bias_gelu as late
        early._set_cuda_rng_state(torch.get_rng_state())
        print(json.dumps([was_compiled, hasattr(compiled.swiglu, "_torchdynamo_orig_callable"),
                          hasattr(late.bias_gelu, "_torchdynamo_orig_callable"), early.torch is torch]))
        """,
        cwd=tmp_path,
    )
    assert json.loads(out) == [True, False, False, False]


@cpu_only
def test_dropout_streams_resume_and_leave_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    install_cpu_platform()
    from megatron.core import tensor_parallel

    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    try:
        tracker.reset()
        torch.manual_seed(5)
        tracker.add("model-parallel-rng", 77)

        def draw() -> tuple[torch.Tensor, torch.Tensor]:
            with tracker.fork("model-parallel-rng"):
                inside = torch.nn.functional.dropout(torch.ones(64), 0.5)
            return inside, torch.nn.functional.dropout(torch.ones(64), 0.5)

        with caplog.at_level(logging.WARNING):
            first = draw()
            saved = {name: state.clone() for name, state in tracker.get_states().items()}, torch.get_rng_state()
            second = draw()
            tracker.set_states(saved[0])
            torch.set_rng_state(saved[1])
            again = draw()
        assert not caplog.records
        assert all(torch.equal(a, b) for a, b in zip(second, again, strict=True))
        assert not torch.equal(first[0], second[0])
        assert not torch.equal(first[0], first[1])
    finally:
        tracker.set_states(states)


@cpu_only
def test_transformers_in_the_same_process_loads_and_computes_the_same(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    code = """
        import sys, torch
        if sys.argv[1] == "installed":
            from megatron_qwen.parallel.device import install_cpu_platform
            install_cpu_platform()
            import megatron.core.models.gpt
        from transformers import Qwen2Config, Qwen2ForCausalLM
        if sys.argv[1] == "clean":
            torch.manual_seed(0)
            model = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, hidden_size=32, intermediate_size=56,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False))
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.3)
            model.save_pretrained("hf")
        for dtype in (torch.float32, torch.bfloat16):
            model = Qwen2ForCausalLM.from_pretrained("hf", dtype=dtype)
            torch.save(model(torch.arange(40)[None] % 96).logits, f"{sys.argv[1]}-{dtype}.pt")
    """
    for role in ("clean", "installed"):
        python(code, role, cwd=tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        clean, installed = (torch.load(tmp_path / f"{role}-{dtype}.pt") for role in ("clean", "installed"))
        assert clean.abs().max() > 0
        assert torch.equal(clean, installed)


def test_does_nothing_where_cuda_is_available(tmp_path: Path) -> None:
    out = python(
        """
        import sys, torch
        torch.cuda.is_available = lambda: True
        from megatron_qwen.parallel.device import install_cpu_platform
        finders, cuda = list(sys.meta_path), torch.Tensor.cuda
        print(install_cpu_platform(), finders == sys.meta_path, cuda is torch.Tensor.cuda)
        """,
        cwd=tmp_path,
    )
    assert out.split() == ["False", "True", "True"]
