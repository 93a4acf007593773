"""Hugging Face -> Megatron -> Hugging Face on real folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_qwen.cli import convert
from megatron_qwen.conversion import export_hf, import_hf, verify
from megatron_qwen.conversion.engine.pieces import TensorRows
from megatron_qwen.conversion.engine.write import write_output
from megatron_qwen.conversion.formats.hf.output import hf_output
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.conversion.formats.torch_dist.source import MegatronFolder, shard_boxes
from megatron_qwen.conversion.parameters import Shard, hf_file_order, parameters
from megatron_qwen.errors import CorruptInputError, IncompleteInputError, MismatchError, QwenError, StorageError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

CONFIGS = {
    "dense": tiny_dense(layers=3, vocab=131),
    "dense_mha": tiny_dense(layers=1, heads=4, kv_heads=4, vocab=7),
    "dense_mqa_tied": tiny_dense(layers=2, kv_heads=1, tied=True),
    "moe": tiny_moe(layers=2),
    "moe_mixed_renormalised": tiny_moe(layers=4, mlp_only_layers=(1,), norm_topk_prob=True),
    "moe_every_second_tied": tiny_moe(layers=4, decoder_sparse_step=2, tied=True),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_bitwise(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [None, 60_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise_equal(tmp_path, name, dtype, max_shard_bytes):
    config = CONFIGS[name]
    write_tiny_hf(tmp_path / "hf", config, dtype=dtype, max_shard_bytes=max_shard_bytes)
    report = import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False, max_shard_bytes=max_shard_bytes or 10**9)
    assert_bitwise(tmp_path / "hf", tmp_path / "back")
    assert verify(tmp_path / "hf", tmp_path / "mg").is_equal
    written = QwenConfig.from_hf(tmp_path / "back")
    assert written == dataclasses.replace(config, torch_dtype=str(dtype).removeprefix("torch."))
    assert report.tensors == len(weights(tmp_path / "hf"))


def test_files_are_those_that_save_pretrained_would_write(tmp_path):
    config = CONFIGS["moe_mixed_renormalised"]
    items = parameters(config)
    order = hf_file_order(items)
    state = {name: torch.randn(shape) for name, shape in order}
    rows = [
        TensorRows(
            label=name,
            shape=shape,
            dtype=torch.float32,
            source_dtype=torch.float32,
            num_tensors=1,
            read=lambda begin, end, name=name: state[name][begin:end],
        )
        for name, shape in order
    ]
    write_output(hf_output(rows, 50_000, block=1000), tmp_path, threads=3)
    split = split_torch_state_dict_into_shards(state, max_shard_size=50_000)
    assert len(split.filename_to_tensors) > 3
    for file, names in split.filename_to_tensors.items():
        save_file({name: state[name] for name in names}, tmp_path / "expected", metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == (tmp_path / "expected").read_bytes(), file
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]


def test_companion_files_travel_byte_for_byte(tmp_path):
    write_tiny_hf(tmp_path / "hf", CONFIGS["dense"])
    content = {
        "tokenizer.json": b'{"a": 1}\r\n',
        "generation_config.json": b"{}",
        "chat_template.jinja": b"{{ x }}\n\n",
    }
    for name, data in content.items():
        (tmp_path / "hf" / name).write_bytes(data)
    (tmp_path / "hf" / "training_args.bin").write_bytes(b"pickle")
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    for name, data in content.items():
        assert (tmp_path / "back" / name).read_bytes() == data
    assert not (tmp_path / "back" / "training_args.bin").exists()


def test_experts_fused_as_transformers_5_keeps_them_are_read(tmp_path):
    config = CONFIGS["moe"]
    write_tiny_hf(tmp_path / "hf", config)
    state = weights(tmp_path / "hf")
    fused = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            leaf: torch.stack([state[f"{prefix}.{expert}.{leaf}.weight"] for expert in range(config.num_experts)])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        fused[f"{prefix}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        fused[f"{prefix}.down_proj"] = parts["down_proj"]
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    save_file(fused, tmp_path / "fused" / "model.safetensors", metadata={"format": "pt"})
    import_hf(tmp_path / "fused", tmp_path / "mg", progress=False)
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    assert_bitwise(tmp_path / "hf", tmp_path / "back")


def test_shards_read_from_both_kinds_of_folder_are_equal(tmp_path):
    config = CONFIGS["moe_mixed_renormalised"]
    write_tiny_hf(tmp_path / "hf", config)
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    hf, megatron = HfFolder(tmp_path / "hf"), MegatronFolder(tmp_path / "mg")
    for item in parameters(config):
        for rank in range(2):
            shard = Shard(rank=rank, size=2)
            assert torch.equal(hf.read(item, shard), megatron.read(item, shard)), item.megatron_name


def test_vocabulary_padding_is_zero_when_loading(tmp_path):
    config = CONFIGS["dense"]
    write_tiny_hf(tmp_path / "hf", config)
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    embedding = parameters(config)[0]
    for source in (HfFolder(tmp_path / "hf"), MegatronFolder(tmp_path / "mg")):
        parts = [source.read(embedding, Shard(rank=rank, size=4), vocabulary_rows=160) for rank in range(4)]
        whole = torch.cat(parts)
        assert torch.equal(whole[:131], weights(tmp_path / "hf")["model.embed_tokens.weight"])
        assert whole.shape == (160, 64)
        assert not whole[131:].any()


def test_shard_boxes_cut_gate_and_up_separately():
    assert shard_boxes((12, 5), 0, Shard(rank=1, size=2), pieces=2) == [((3, 0), (3, 5)), ((9, 0), (3, 5))]
    assert shard_boxes((5, 12), 1, Shard(rank=2, size=3), pieces=1) == [((0, 8), (5, 4))]


def test_cast_on_the_way_is_reported(tmp_path):
    write_tiny_hf(tmp_path / "hf", CONFIGS["dense"])
    report = import_hf(tmp_path / "hf", tmp_path / "mg", dtype="bfloat16", progress=False)
    assert report.dtype == "bfloat16"
    assert 0 < report.max_cast_error < 0.1
    assert QwenConfig.from_hf(tmp_path / "mg" / "hf").torch_dtype == "bfloat16"
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    expected = {name: tensor.bfloat16() for name, tensor in weights(tmp_path / "hf").items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "back").items())


def test_tensors_that_megatron_merges_must_agree_in_dtype(tmp_path):
    write_tiny_hf(tmp_path / "hf", CONFIGS["moe_mixed_renormalised"])
    state = load_file(tmp_path / "hf" / "model.safetensors")
    names = [name for name in state if name.endswith("k_proj.bias")]
    save_file(
        {name: tensor.bfloat16() if name in names else tensor for name, tensor in state.items()},
        tmp_path / "hf" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        MismatchError, match=r"(?s)4 findings.*layers.0.*k_proj.bias.*differ in dtype \(BF16, F32\).*--dtype"
    ):
        import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    import_hf(tmp_path / "hf", tmp_path / "mg", dtype="float32", progress=False, verify=True)
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    for name, tensor in weights(tmp_path / "back").items():
        assert torch.equal(tensor, state[name].bfloat16().float() if name in names else state[name]), name


def test_nothing_is_overwritten_without_being_asked(tmp_path):
    write_tiny_hf(tmp_path / "hf", CONFIGS["dense"])
    (tmp_path / "mg").mkdir()
    (tmp_path / "mg" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="--overwrite"):
        import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    assert (tmp_path / "mg" / "notes.txt").read_text() == "mine"
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False, overwrite=True)
    assert not (tmp_path / "mg" / "notes.txt").exists()
    (tmp_path / "mg" / "iter_0000010").mkdir()
    with pytest.raises(StorageError, match="training steps"):
        import_hf(tmp_path / "hf", tmp_path / "mg", progress=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mg"]


def test_release_holds_a_manifest_and_no_path_of_this_machine(tmp_path):
    write_tiny_hf(tmp_path / "hf", CONFIGS["dense"])
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    assert (tmp_path / "mg" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (tmp_path / "mg" / "release" / "manifest.json").is_file()
    leaks = [path for path in (tmp_path / "mg").rglob("*") if path.is_file() and b"incomplete-" in path.read_bytes()]
    assert not leaks
    (tmp_path / "mg" / "release" / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(CorruptInputError, match=r"__0_0\.distcp: 5 bytes"):
        export_hf(tmp_path / "mg", tmp_path / "back", progress=False)


def test_checkpoint_of_an_unknown_model_needs_a_config(tmp_path):
    write_tiny_hf(tmp_path / "hf", CONFIGS["dense"])
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    (tmp_path / "mg" / "hf" / "config.json").unlink()
    (tmp_path / "mg" / "release" / "manifest.json").unlink()
    (tmp_path / "mg" / "release" / "common.pt").unlink()  # Megatron-LM's arguments, which would do
    with pytest.raises(IncompleteInputError, match="--config"):
        export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    wrong = dataclasses.replace(CONFIGS["dense"], num_hidden_layers=4)
    with pytest.raises(MismatchError, match="num_hidden_layers"):
        export_hf(tmp_path / "mg", tmp_path / "back", progress=False, config=wrong)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("text", "step"), [("9", None), ("", None), ("garbage", None), ("release", 3)])
def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path, text, step):
    write_tiny_hf(tmp_path / "hf", CONFIGS["dense_mha"])
    import_hf(tmp_path / "hf", tmp_path / "mg", progress=False)
    (tmp_path / "mg" / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises((IncompleteInputError, CorruptInputError), match="complete checkpoints in it: release"):
        export_hf(tmp_path / "mg", tmp_path / "back", step=step, progress=False)


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    convert.register(app)
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    code = result.exception.exit_code if isinstance(result.exception, QwenError) else result.exit_code
    return code, result.stdout


def test_the_commands_convert_and_compare(tmp_path):
    write_tiny_hf(tmp_path / "hf", CONFIGS["dense"])
    code, text = command("import", tmp_path / "hf", tmp_path / "mg", "--json")
    assert (code, json.loads(text)["tensors"]) == (0, 39)
    code, text = command("export", tmp_path / "mg", tmp_path / "back", "--max-shard-size", "100KB")
    assert code == 0
    assert "39" in text
    assert command("verify", tmp_path / "hf", tmp_path / "mg")[0] == 0
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    state = load_file(tmp_path / "hf" / "model.safetensors")
    state["model.norm.weight"][3] += 0.5
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    assert command("verify", tmp_path / "hf", tmp_path / "back")[0] == 3
    assert command("export", tmp_path / "mg", tmp_path / "new", "--max-shard-size", "lots")[0] == 2
    assert command("export", tmp_path / "mg", tmp_path / "back")[0] == 4
