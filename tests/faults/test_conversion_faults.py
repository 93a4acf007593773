"""Faults 13 to 19: configuration and weights that contradict each other, and numbers; nothing is ever left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hostile import command
from safetensors.torch import load_file, save_file

from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.errors import (
    ConfigError,
    MismatchError,
    NumericsError,
)
from megatron_qwen.testing.tiny import tiny_dense, write_tiny_hf


@pytest.fixture
def hf(tmp_path):
    return write_tiny_hf(tmp_path / "hf", tiny_dense(layers=3, vocab=131))


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, metadata={"format": "pt"})


def refused(folder: Path, kind: type[Exception], **options) -> str:
    target = folder.parent / "out"
    before = sorted(folder.parent.iterdir())
    with pytest.raises(kind) as caught:
        import_hf(folder, target, progress=False, **options)
    assert sorted(folder.parent.iterdir()) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 4}, ["num_hidden_layers: config.json says 4, weights have 3", "layers.*.mlp"]),
        ({"num_hidden_layers": 2}, ["num_hidden_layers: config.json says 2, weights have 3"]),
        ({"intermediate_size": 96}, ["intermediate_size: config.json says 96, the weights have 112 (9 tensors"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads: config.json says 4 heads of 16 = 64 rows"]),
        ({"hidden_size": 128}, ["hidden_size: config.json says 128, the weights have 64"]),
        ({"vocab_size": 151}, ["vocab_size: config.json says 151, the weights have 131 (2 tensors"]),
        ({"num_attention_heads": 2}, ["num_key_value_heads: config.json says 2 heads of 32 = 64 rows"]),
    ],
)  # fmt: skip
def test_16_config_and_weights_of_different_models(hf, fields, expected):
    edit_config(hf, **fields)
    message = refused(hf, MismatchError)
    assert all(text in message for text in expected), message


def test_16_every_contradiction_is_listed_at_once(hf):
    edit_config(hf, num_hidden_layers=2, intermediate_size=96, vocab_size=99)
    edit_weights(hf, lambda state: [state.pop(f"model.layers.{i}.self_attn.k_proj.bias") for i in range(3)])
    message = refused(hf, MismatchError)
    for text in ("num_hidden_layers", "intermediate_size", "vocab_size", "k_proj.bias: missing (2 times"):
        assert text in message, message


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "lama"),
        ({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, "wen3"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ],
)
def test_17_another_family_is_refused_by_name(hf, fields, found):
    edit_config(hf, **fields)
    assert found in refused(hf, ConfigError)


def test_17_weights_of_another_family_under_a_qwen_config(hf):
    def to_qwen3(state):
        for layer in range(3):
            state[f"model.layers.{layer}.self_attn.q_norm.weight"] = torch.ones(16)
            for name in "qkv":
                state.pop(f"model.layers.{layer}.self_attn.{name}_proj.bias")

    edit_weights(hf, to_qwen3)
    message = refused(hf, MismatchError)
    assert "norms of q and k belong to Qwen3" in message
    assert "q_proj.bias: missing (3 times" in message


def test_18_tied_model_has_one_matrix_and_needs_none_twice(tmp_path):
    folder = write_tiny_hf(tmp_path / "hf", tiny_dense(layers=1, tied=True))
    edit_weights(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    report = import_hf(folder, tmp_path / "mg", progress=False)
    assert any("tied" in note for note in report.notes)
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    assert "lm_head.weight" not in load_file(tmp_path / "back" / "model.safetensors")


def test_18_tied_model_with_another_output_matrix_is_refused(tmp_path):
    folder = write_tiny_hf(tmp_path / "hf", tiny_dense(layers=1, tied=True))
    edit_weights(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1}))
    assert "tie_word_embeddings" in refused(folder, MismatchError)


def test_18_untied_model_without_output_matrix_is_refused(hf):
    edit_weights(hf, lambda state: state.pop("lm_head.weight"))
    assert "lm_head.weight: missing; if the output shares the embedding, tie_word_embeddings" in refused(
        hf, MismatchError
    )


def pad_checkpoint(hf: Path, tmp_path: Path, value: float) -> Path:
    """A Megatron checkpoint of 131 tokens whose vocabulary was padded to 160 rows, as for TP 8 x 4."""
    edit_config(hf, vocab_size=160)

    def pad(state):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.nn.functional.pad(state[name], (0, 0, 0, 29))
            state[name][150, 5] = value

    edit_weights(hf, pad)
    import_hf(hf, tmp_path / "mg", progress=False)
    edit_config(tmp_path / "mg" / "hf", vocab_size=131)
    return tmp_path / "mg"


def test_19_zero_padding_of_the_vocabulary_is_dropped_on_export(hf, tmp_path):
    original = load_file(hf / "model.safetensors")
    export_hf(pad_checkpoint(hf, tmp_path, 0.0), tmp_path / "back", progress=False)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


def test_19_padding_that_is_not_zero_is_an_error(hf, tmp_path):
    folder = pad_checkpoint(hf, tmp_path, 0.25)
    with pytest.raises(MismatchError, match=r"160 rows.*131 \(vocab_size\), and row 150"):
        export_hf(folder, tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob("*incomplete*"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_13_other_dtypes_need_to_be_asked_for(hf, dtype):
    def change(state):
        state["model.norm.weight"] = state["model.norm.weight"].to(dtype)

    edit_weights(hf, change)
    assert "model.norm.weight" in refused(hf, MismatchError)
    if dtype == torch.float64:
        import_hf(hf, hf.parent / "out", dtype="float32", progress=False)


def test_14_overflow_in_fp16_names_tensor_count_and_limit(hf):
    edit_weights(hf, lambda state: state["model.layers.1.mlp.up_proj.weight"][3].fill_(1e5))
    message = refused(hf, NumericsError, dtype="float16")
    assert "model.layers.1.mlp.up_proj.weight: 64 of 7168 values overflow" in message
    assert "bfloat16" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_15_nan_and_infinity_are_refused_with_their_place(hf, value):
    edit_weights(hf, lambda state: state["model.layers.2.self_attn.v_proj.weight"][7, 9].fill_(value))
    assert (
        "model.layers.2.self_attn.v_proj.weight: 1 of 2048 values are NaN or infinite, the first at (7, 9)"
        in refused(hf, NumericsError)
    )
    import_hf(hf, hf.parent / "mg", allow_nonfinite=True, progress=False)
    with pytest.raises(NumericsError, match="v_proj"):
        export_hf(hf.parent / "mg", hf.parent / "back", progress=False)


def test_13_narrowing_cast_reports_the_largest_change(hf, tmp_path):
    ended = command("convert", "import", hf, tmp_path / "out", "--dtype", "bfloat16", "--json")
    state = load_file(hf / "model.safetensors")
    largest = max(float((tensor - tensor.bfloat16().float()).abs().max()) for tensor in state.values())
    assert ended.report["max_cast_error"] == pytest.approx(largest)
    assert any("the cast changed values in" in note for note in ended.report["notes"])


@pytest.mark.parametrize("tp", [2, 4])
def test_19_rows_added_for_tensor_parallel_ranks_are_zero_and_dropped_again(hf, tmp_path, tp):
    """131 tokens are cut into equal shards by zero rows, which the model's config.json knows nothing of."""
    options = ("--ckpt-format", "torch", "--tp", tp)
    assert command("convert", "import", hf, tmp_path / "out", *options).code == 0
    shards = [
        torch.load(file, weights_only=False)["model"]["embedding.word_embeddings.weight"]
        for file in sorted((tmp_path / "out" / "release").glob("*/model_optim_rng.pt"))
    ]
    assert len(shards) == tp
    whole = torch.cat(shards)
    assert whole.shape[0] == -(-131 // tp) * tp > 131
    assert not whole[131:].any()
    assert command("convert", "export", tmp_path / "out", tmp_path / "back", "--allow-pickle").code == 0
    back, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", hf))
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 131
