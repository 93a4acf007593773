"""Per-rank folders that are wrong, and what is made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_qwen.conversion import export_hf, import_hf, reshard, verify
from megatron_qwen.conversion.formats.legacy.layout import RANK_FILE
from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.parameters import parameters
from megatron_qwen.errors import (
    ConfigError,
    CorruptInputError,
    IncompleteInputError,
    MismatchError,
    UnsafeInputError,
)
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.tiny import tiny_dense, tiny_moe, write_tiny_hf

DENSE = tiny_dense(layers=4, vocab=131)
TIED = tiny_dense(layers=4, vocab=131, tied=True)
MOE = tiny_moe(layers=4, vocab=96, experts=8, mlp_only_layers=(1,))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    made = {}
    for name, config, layout in (
        ("dense", DENSE, ParallelLayout(tp=2, pp=2)),
        ("tied", TIED, ParallelLayout(pp=2)),
        ("moe", MOE, ParallelLayout(tp=2, ep=2)),
    ):
        write_tiny_hf(root / name / "hf", config)
        import_hf(root / name / "hf", root / name / "mg", ckpt_format="torch", layout=layout, progress=False)
        (root / name / "mg" / "release" / "manifest.json").unlink()
        made[name] = root / name / "mg"
    return made


@pytest.fixture
def folder(good, tmp_path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        shutil.copytree(good[name], tmp_path / name)
        return tmp_path / name

    return copy


def change(folder: Path, rank: str, edit: Callable[[dict[str, Any]], None]) -> Path:
    file = folder / "release" / rank / RANK_FILE
    content = torch.load(file, weights_only=False)
    edit(content)
    torch.save(content, file)
    return file


def read_all(folder: Path) -> None:
    source = LegacyFolder(folder, allow_pickle=True)
    for parameter in parameters(source.config):
        source.hf_tensors(parameter)


def refuse(folder: Path, error: type[Exception], *words: str, read: bool = False) -> str:
    with pytest.raises(error) as caught:
        read_all(folder) if read else LegacyFolder(folder, allow_pickle=True)
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
    return str(caught.value)


def test_20_a_replica_that_differs_names_both_files_and_the_tensor(folder):
    path = folder("dense")
    name = "decoder.layers.1.pre_mlp_layernorm.weight"
    change(path, "mp_rank_01_001", lambda content: content["model"][name].add_(1e-3))
    words = ("mp_rank_00_001", "mp_rank_01_001", "decoder.layers.3.pre_mlp_layernorm.weight", "different values")
    refuse(path, MismatchError, *words, read=True)


def test_20_equal_replicas_with_other_bits_of_zero_are_still_a_difference(folder):
    path = folder("moe")
    name = "decoder.layers.0.mlp.router.weight"

    def flip(content: dict[str, Any]) -> None:
        content["model"][name][0, 0] = -0.0

    change(path, "mp_rank_00_000", lambda content: content["model"][name][0].zero_())
    for rank in ("mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"):
        change(path, rank, lambda content: content["model"][name][0].zero_())
    change(path, "mp_rank_01_001", flip)
    refuse(path, MismatchError, "mp_rank_01_001", "router.weight", read=True)


def test_20_a_tied_output_that_left_its_embedding(folder):
    path = folder("tied")
    change(path, "mp_rank_00_001", lambda content: content["model"]["output_layer.weight"][5].mul_(2))
    refuse(path, MismatchError, "mp_rank_00_000", "mp_rank_00_001", "embedding.word_embeddings.weight", read=True)


def test_20_a_layer_that_two_stages_own(folder):
    path = folder("dense")

    def add(content: dict[str, Any]) -> None:
        extra = {k.replace("layers.1.", "layers.2."): v for k, v in content["model"].items() if "layers.1." in k}
        content["model"] |= extra

    for rank in ("mp_rank_00_000", "mp_rank_01_000"):
        change(path, rank, add)
    refuse(path, MismatchError, "num_hidden_layers", "expected 4", "(3, 2)")


def test_a_missing_rank_file_is_named_with_what_it_costs(folder):
    path = folder("dense")
    shutil.rmtree(path / "release" / "mp_rank_01_001")
    refuse(path, IncompleteInputError, "mp_rank_01_001", "parameters are not complete", "decoder.layers.2")
    shutil.rmtree(path / "release" / "mp_rank_00_001")
    refuse(path, IncompleteInputError, "no rank file of pipeline rank 1 of 2")


def test_missing_rank_files_whose_tensors_are_elsewhere_are_no_loss(tmp_path):
    """At tp 2, ep 3, etp 1 Megatron-LM (0.19) writes three of the six files that its ranks open: all tensors, once."""
    config, layout = tiny_moe(layers=2, vocab=96, experts=6), ParallelLayout(tp=2, ep=3, etp=1)
    write_tiny_hf(tmp_path / "hf", config)
    import_hf(tmp_path / "hf", tmp_path / "mg", ckpt_format="torch", layout=layout, progress=False)
    step = tmp_path / "mg" / "release"
    (step / "manifest.json").unlink()
    kept = {"mp_rank_00_000", "mp_rank_01_001", "mp_rank_00_002"}
    for path in step.glob("mp_rank_*"):
        if path.name not in kept:
            shutil.rmtree(path)
    export_hf(tmp_path / "mg", tmp_path / "back", allow_pickle=True, progress=False)
    left, right = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", tmp_path / "back"))
    assert all(torch.equal(left[key], right[key]) for key in left)
    shutil.rmtree(step / "mp_rank_01_001")
    refuse(tmp_path / "mg", IncompleteInputError, "mp_rank_01_001", "parameters are not complete")


@pytest.mark.parametrize("has_arguments", [True, False])
def test_files_of_one_rank_alone(folder, has_arguments):
    path = folder("moe")
    for rank in ("mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"):
        shutil.rmtree(path / "release" / rank)
    if not has_arguments:
        change(path, "mp_rank_00_000", lambda content: content.pop("args"))
    with pytest.raises((IncompleteInputError, MismatchError), match=r"mp_rank_01_001|shape|not a tensor"):
        LegacyFolder(path, allow_pickle=True)


def test_every_tensor_that_is_missing_surplus_or_of_another_shape_is_listed(folder):
    path = folder("dense")

    def spoil(content: dict[str, Any]) -> None:
        model = content["model"]
        del model["decoder.layers.0.self_attention.linear_qkv.bias"]
        model["decoder.layers.1.self_attention.q_layernorm.weight"] = torch.ones(16)
        model["decoder.layers.1.mlp.linear_fc2.weight"] = torch.ones(64, 57)
        model["decoder.layers.0.mlp.linear_fc1.weight"] = model["decoder.layers.0.mlp.linear_fc1.weight"].to(torch.int8)

    change(path, "mp_rank_01_000", spoil)
    text = refuse(
        path, MismatchError, "4 findings", "linear_qkv.bias", "missing", "q_layernorm", "not a tensor of this"
    )
    assert "(64, 57), expected (64, 56)" in text
    assert "torch.int8" in text
    assert text.count("mp_rank_01_000 model") == 4


def test_19_vocabulary_padding_that_is_not_zero(folder):
    path = folder("dense")
    change(path, "mp_rank_01_000", lambda content: content["model"]["embedding.word_embeddings.weight"][-1].fill_(1))
    refuse(path, MismatchError, "embedding.word_embeddings.weight", "row 131", "not zero", read=True)


def test_19_more_padding_than_we_would_add_is_read(good, folder, tmp_path):
    """Megatron-LM pads to a multiple of 128 per tensor rank; vocab_size of config.json decides what is kept."""
    path = folder("dense")
    for stage, name in (("000", "embedding.word_embeddings.weight"), ("001", "output_layer.weight")):
        files = [path / "release" / f"mp_rank_0{i}_{stage}" / RANK_FILE for i in (0, 1)]
        whole = torch.cat([torch.load(file, weights_only=False)["model"][name] for file in files])
        for file, half in zip(files, torch.cat([whole[:131], torch.zeros(256 - 131, 64)]).chunk(2), strict=True):
            change(path, file.parent.name, lambda content, name=name, half=half: content["model"].update({name: half}))
    export_hf(path, tmp_path / "back", allow_pickle=True, progress=False)
    left, right = (
        load_file(folder / "model.safetensors") for folder in (good["dense"].parent / "hf", tmp_path / "back")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_without_the_flag_nothing_is_opened(folder, monkeypatch):
    path = folder("dense")
    monkeypatch.setattr(
        "megatron_qwen.conversion.formats.legacy.files.open_torch_file", lambda *_: pytest.fail("opened")
    )
    for opener in (LegacyFolder, open_source, lambda each: export_hf(each, each / "out", progress=False)):
        with pytest.raises(UnsafeInputError, match="--allow-pickle"):
            opener(path)


def test_12_a_payload_in_a_rank_file_does_not_run(folder, tmp_path):
    class Payload:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    path = folder("dense")
    change(path, "mp_rank_01_001", lambda content: content.update(extra=Payload()))
    refuse(path, UnsafeInputError, "builtins.eval", "mp_rank_01_001")
    assert not (tmp_path / "ran").exists()


def test_a_rank_file_that_links_out_of_the_folder(folder, tmp_path):
    path = folder("dense")
    file = path / "release" / "mp_rank_00_000" / RANK_FILE
    file.rename(tmp_path / "elsewhere.pt")
    file.symlink_to(tmp_path / "elsewhere.pt")
    refuse(path, UnsafeInputError, "link", "elsewhere.pt")


def test_a_truncated_rank_file(folder):
    path = folder("dense")
    file = path / "release" / "mp_rank_00_000" / RANK_FILE
    file.write_bytes(file.read_bytes()[:-100])
    refuse(path, CorruptInputError, "mp_rank_00_000", "truncated")


@pytest.mark.parametrize("version", [2.0, 0, None, "3.0"])
def test_older_checkpoint_versions_are_refused(folder, version):
    path = folder("dense")
    change(path, "mp_rank_00_000", lambda content: content.update(checkpoint_version=version))
    refuse(path, MismatchError, "checkpoint_version", "3.0")


def test_models_before_megatron_core_are_refused_by_name(folder):
    path = folder("dense")
    change(path, "mp_rank_00_000", lambda content: content.update(model={"language_model": content["model"]}))
    refuse(path, MismatchError, "language_model", "megatron-core")


@pytest.mark.parametrize("has_arguments", [True, False])
@pytest.mark.parametrize("name", ["mp_rank_00_999999999", "mp_rank_999999999_000"])
def test_a_folder_name_of_an_absurd_rank_is_refused_at_once(folder, name, has_arguments):
    path = folder("dense")
    shutil.copytree(path / "release" / "mp_rank_00_000", path / "release" / name)
    for rank in sorted((path / "release").glob("mp_rank_*")):
        if not has_arguments:
            change(path, rank.name, lambda content: content.pop("args"))
    refuse(path, MismatchError, "1000000000")


def test_arguments_of_another_run_are_a_contradiction(folder):
    path = folder("dense")
    for rank in ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001"):
        change(path, rank, lambda content: setattr(content["args"], "tensor_model_parallel_size", 1))
    refuse(path, MismatchError, "tp: arguments 1, files 2")


@pytest.mark.parametrize("name", ["dense", "tied", "moe"])
def test_without_arguments_the_layout_is_read_off_names_and_keys(folder, name, tmp_path):
    path = folder(name)
    for rank in sorted((path / "release").glob("mp_rank_*")):
        change(path, rank.name, lambda content: content.pop("args"))
    source = LegacyFolder(path, allow_pickle=True)
    expected = {"dense": (2, 2, 1, 1), "tied": (1, 2, 1, 1), "moe": (2, 1, 1, 2)}[name]
    assert (source.layout.tp, source.layout.pp, source.layout.vpp, source.layout.ep) == expected
    export_hf(path, tmp_path / "back", allow_pickle=True, progress=False)


def test_without_arguments_and_config_the_model_is_asked_for(folder):
    path = folder("dense")
    for rank in sorted((path / "release").glob("mp_rank_*")):
        change(path, rank.name, lambda content: content.pop("args"))
    shutil.rmtree(path / "hf")
    refuse(path, IncompleteInputError, "--config")


def test_config_of_another_model(folder):
    path = folder("dense")
    content = json.loads((path / "hf" / "config.json").read_text())
    (path / "hf" / "config.json").write_text(
        json.dumps({**content, "intermediate_size": 128, "num_key_value_heads": 4})
    )
    text = refuse(path, MismatchError, "linear_qkv.weight", "linear_fc1.weight", "linear_fc2.weight")
    assert "layers.*" in text


def test_layers_of_two_dtypes_go_where_they_are_not_stacked(folder, tmp_path):
    path = folder("dense")
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    for rank in ("mp_rank_00_000", "mp_rank_01_000"):
        change(path, rank, lambda content: content["model"].update({name: content["model"][name].bfloat16()}))
    words = rf"{name} is torch.bfloat16.*layers\.1.*is torch.float32.*give --dtype"
    with pytest.raises(ConfigError, match=words):
        reshard(path, tmp_path / "dist", allow_pickle=True, progress=False)
    assert not (tmp_path / "dist").exists()
    reshard(path, tmp_path / "dist", allow_pickle=True, progress=False, dtype="float32")
    reshard(path, tmp_path / "ranks", allow_pickle=True, progress=False, ckpt_format="torch")
    assert verify(path, tmp_path / "ranks", allow_pickle=True).is_equal
    report = export_hf(path, tmp_path / "hf", allow_pickle=True, progress=False)
    assert "dtypes are mixed: mostly float32, 1 parameters differ" in report.notes


def test_experts_of_two_dtypes_are_refused(folder):
    path = folder("moe")
    name = "decoder.layers.2.mlp.experts.local_experts.1.linear_fc2.weight"
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        change(path, rank, lambda content: content["model"].update({name: content["model"][name].bfloat16()}))
    refuse(path, MismatchError, "local_experts.5.linear_fc2.weight is torch.bfloat16", "experts of a layer")
