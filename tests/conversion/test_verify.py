"""`convert verify`: every difference of weights, configuration and files is found, named and counted."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from megatron_qwen import conversion
from megatron_qwen.checkpoint.manifest import write_manifest
from megatron_qwen.cli import convert
from megatron_qwen.conversion import verify
from megatron_qwen.conversion.comparison import weights
from megatron_qwen.conversion.comparison.manifests import compare_manifests
from megatron_qwen.conversion.comparison.weights import compare_tensors
from megatron_qwen.errors import ConfigError, CorruptInputError, IncompleteInputError, QwenError, UnsafeInputError
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf


def change(source: Path, target: Path, edit) -> Path:
    """Copy a Hugging Face folder with its weights changed."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    edit(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def invoke(*arguments) -> tuple[int, str]:
    app = typer.Typer()
    convert.register(app)
    result = CliRunner().invoke(app, ["convert", "verify", *map(str, arguments)])
    if isinstance(result.exception, QwenError):
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, result.stdout


def test_bits_are_compared_not_values():
    zero = torch.zeros(3)
    assert compare_tensors("x", zero, zero.clone()) == []
    (difference,) = compare_tensors("x", zero, torch.tensor([0.0, -0.0, 0.0]))
    assert (difference.kind, difference.count, difference.first, difference.max_abs) == ("values", 1, (1,), 0.0)
    nan = torch.full((2, 2), float("nan"))
    assert compare_tensors("x", nan, nan.clone()) == []
    (difference,) = compare_tensors("x", nan, torch.zeros(2, 2))
    assert (difference.count, difference.max_abs) == (4, 0.0)


def test_shape_and_dtype_are_named():
    assert compare_tensors("x", torch.zeros(2), torch.zeros(3))[0].kind == "shape"
    exact = torch.tensor([1.0, 1.0 + 2**-20])
    (difference,) = compare_tensors("x", exact, exact.bfloat16())
    assert (difference.kind, difference.count) == ("dtype", 0)
    assert difference.detail == "torch.float32 and torch.bfloat16, equal when rounded"
    (difference,) = compare_tensors("x", exact, torch.tensor([1.0, 1.5]).bfloat16())
    assert (difference.kind, difference.count, difference.first) == ("dtype", 1, (1,))
    assert "also rounded: 1.0" in difference.detail


def test_every_difference_of_two_folders_is_listed(tmp_path):
    write_tiny_hf(tmp_path / "a", tiny_dense(layers=2))
    write_tiny_hf(tmp_path / "b", tiny_dense(layers=3, tied=True, rope_theta=5e5, ffn=70), seed=1)
    report = verify(tmp_path / "a", tmp_path / "b")
    kinds = {difference.name: difference.kind for difference in report.differences}
    assert kinds["config.rope_theta"] == kinds["config.num_hidden_layers"] == "config"
    assert kinds["model.layers.2.mlp.up_proj.weight"] == "missing in A"
    assert kinds["lm_head.weight"] == "missing in B"
    assert kinds["model.layers.1.self_attn.k_proj.bias"] == "values"
    assert kinds["model.layers.1.mlp.down_proj.weight"] == "shape"
    assert report.tensors == 3 + 2 * 9 - 1
    json.dumps(report.to_json())


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_of_a_tensor_make_one_difference(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 1000)  # three rows of 64 fp32 values

    def edit(weights):
        weights["lm_head.weight"][50, 7] += 3.0
        weights["lm_head.weight"][120, 1] -= 5.0
        weights["model.norm.weight"][9] = 0.0

    a = write_tiny_hf(tmp_path / "a", tiny_dense(layers=1, vocab=131))
    b = change(a, tmp_path / "b", edit)
    seen = []

    def advance(tensors: int, num_bytes: int) -> None:
        seen.append((tensors, num_bytes))

    totals = []

    @contextlib.contextmanager
    def progress(what: str, items: int, num_bytes: int):
        totals.append((items, num_bytes))
        yield advance

    report = verify(a, b, threads=threads, progress=progress)
    norm, head = sorted(report.differences, key=lambda item: item.name, reverse=True)
    assert (head.name, head.count, head.first) == ("lm_head.weight", 2, (50, 7))
    assert head.max_abs == pytest.approx(5.0)
    assert head.detail.endswith(" at (50, 7)")
    assert (norm.name, norm.count, norm.first) == ("model.norm.weight", 1, (9,))
    assert tuple(map(sum, zip(*seen, strict=True))) == totals[0] == (report.tensors, report.weight_bytes)
    assert report.weight_bytes == sum(x.nbytes for x in load_file(a / "model.safetensors").values())


def test_every_format_is_taken_on_either_side(tmp_path):
    config = tiny_moe(layers=2, vocab=131)
    hf = write_tiny_hf(tmp_path / "hf", config, dtype=torch.bfloat16, max_shard_bytes=60_000)
    conversion.import_hf(hf, tmp_path / "dist", progress=False)
    layout = ParallelLayout(tp=2, pp=2, ep=2)
    conversion.import_hf(hf, tmp_path / "ranks", progress=False, ckpt_format="torch", layout=layout)
    other = write_tiny_hf(tmp_path / "other", config, dtype=torch.bfloat16, seed=3)
    folders = [hf, tmp_path / "dist", tmp_path / "ranks"]
    for folder in folders[1:]:
        for pair in ((hf, folder), (folder, hf), (folder, tmp_path / "dist")):
            assert verify(*pair, allow_pickle=True).is_equal
        report = verify(folder, other, allow_pickle=True)
        assert len(report.differences) == report.tensors == len(load_file(other / "model.safetensors"))
    assert conversion.compare_logits(hf, tmp_path / "ranks", allow_pickle=True).is_equal
    with pytest.raises(UnsafeInputError, match="allow-pickle"):
        verify(hf, tmp_path / "ranks")


def test_manifests_say_what_is_missing_extra_and_changed(tmp_path):
    hf = write_tiny_hf(tmp_path / "hf", tiny_dense(layers=1), max_shard_bytes=40_000)
    write_manifest(hf)
    shards = sorted(path.name for path in hf.glob("*.safetensors"))
    assert len(shards) >= 3
    sound = compare_manifests(hf)
    assert sound.is_equal
    assert sound.files == len(list(hf.iterdir())) - 1
    copy = shutil.copytree(hf, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    assert compare_manifests(hf, copy).is_equal, "a copy without a manifest is compared with that of the original"
    (copy / shards[0]).unlink()
    content = bytearray((copy / shards[1]).read_bytes())
    content[-1] ^= 1
    (copy / shards[1]).write_bytes(content)
    (copy / "notes.txt").write_text("mine")
    report = compare_manifests(copy, hf)
    found = {item.name: item for item in report.differences}
    assert {name: item.kind for name, item in found.items()} == {
        shards[0]: "missing",
        shards[1]: "changed",
        "notes.txt": "extra",
    }
    changed = found[shards[1]]
    assert changed.folder == str(copy)
    assert changed.expected.bytes == changed.found.bytes
    assert changed.expected.sha256 != changed.found.sha256
    json.dumps(report.to_json())


def test_manifests_of_every_step_are_found_and_loose_files_named(tmp_path):
    hf = write_tiny_hf(tmp_path / "hf", tiny_dense(layers=1))
    conversion.import_hf(hf, tmp_path / "mg", progress=False)
    with pytest.raises(IncompleteInputError, match=r"no manifest.json"):
        compare_manifests(hf)
    report = compare_manifests(hf, tmp_path / "mg")
    assert report.is_equal
    assert str(hf / "model.safetensors") in report.uncovered
    steps = shutil.copytree(tmp_path / "mg", tmp_path / "run")
    other = write_tiny_hf(tmp_path / "other", tiny_dense(layers=1), seed=1)
    conversion.import_hf(other, tmp_path / "next", progress=False)
    (tmp_path / "next" / "release").rename(steps / "iter_0000007")
    assert compare_manifests(steps).is_equal, "two steps of a run are not copies of each other"
    assert not compare_manifests(steps, tmp_path / "next").differences
    (steps / "release" / "manifest.json").unlink()
    assert compare_manifests(steps, tmp_path / "mg").is_equal
    data = next((tmp_path / "mg" / "release").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (difference,) = compare_manifests(tmp_path / "mg").differences
    assert (difference.name, difference.kind) == (data.name, "changed")
    (tmp_path / "mg" / "release" / "manifest.json").write_text("{")
    with pytest.raises(CorruptInputError):
        compare_manifests(tmp_path / "mg")


def test_the_command_combines_the_depths(tmp_path):
    a = write_tiny_hf(tmp_path / "a", tiny_dense(layers=2))
    write_manifest(a)
    b = change(a, tmp_path / "b", lambda weights: weights["model.layers.1.self_attn.k_proj.bias"].zero_())
    assert invoke(a, a)[0] == 0
    assert "equal to the last bit" in invoke(a, a)[1]
    status, output = invoke(a, b, "--json")
    content = json.loads(output)
    assert status == 3
    assert list(content) == ["is_equal", "weights"]
    assert [item["name"] for item in content["weights"]["differences"]] == ["model.layers.1.self_attn.k_proj.bias"]
    status, output = invoke(a, b, "--logits", "--manifest", "--weights", "--tokens", "20", "--json")
    content = json.loads(output)
    assert status == 3
    assert list(content) == ["is_equal", "manifest", "weights", "logits"]
    assert content["logits"]["tokens"] == 20
    assert content["logits"]["divergences"][0]["module"] == "self_attention.linear_qkv"
    status, output = invoke(a, b, "--logits")
    assert status == 3
    assert "first divergence: layer 1, self_attention.linear_qkv" in output
    assert "k_proj.bias: zero in B): max |A-B|" in output
    status, output = invoke(b, "--manifest")
    assert status == 3
    assert "model.safetensors" in output
    assert invoke(a, "--manifest")[0] == 0
    assert invoke(a, b, "--logits", "--tolerance", "1e9")[0] == 0
    assert invoke(a, "--logits")[0] == ConfigError.exit_code
    assert invoke(a, tmp_path / "nowhere")[0] == 3
    assert invoke(a, b, "--threads", "0")[0] == ConfigError.exit_code
