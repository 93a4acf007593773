"""Which rank file holds what, against a simulation of the ranks; and per-rank folders that are wrong."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_qwen.conversion import export_hf, import_hf
from megatron_qwen.conversion.hf import HfFolder
from megatron_qwen.conversion.legacy import LegacyFolder, shard_runs
from megatron_qwen.conversion.legacy_layout import RANK_FILE, rank_files, vocabulary_rows
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.parameters import Shard, parameters
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


def simulate(layout: ParallelLayout) -> dict[str, set[tuple[int, int, int, int]]]:
    """(tensor, pipeline, expert, expert tensor) rank of every rank of a job, by the file that it opens.

    Ranks in Megatron's order tp-cp-ep-dp-pp, the experts' groups over the same ranks.
    """
    etp = layout.expert_tensor_parallel_size
    dense, expert = layout.tp * layout.cp, etp * layout.ep
    per_stage = dense * expert  # a multiple of both
    found = defaultdict(set)
    for rank in range(per_stage * layout.pp):
        pipeline, within = divmod(rank, per_stage)
        tensor, expert_rank, expert_tensor = within % layout.tp, within // etp % layout.ep, within % etp
        name = f"mp_rank_{tensor:02d}"
        name += f"_{pipeline:03d}" if layout.pp > 1 else ""
        name += f"_{expert_rank:03d}" if layout.ep > 1 else ""
        found[name].add((tensor, pipeline, expert_rank, expert_tensor))
    return found


GRID = [
    ParallelLayout(tp=tp, pp=pp, ep=ep, etp=etp, cp=cp)
    for tp, pp, ep, etp, cp in product((1, 2, 4), (1, 2), (1, 2, 4, 8), (1, 2, 4, None), (1, 2))
    if etp is None or tp % etp == 0
]


@pytest.mark.parametrize("layout", GRID, ids=lambda each: f"tp{each.tp}pp{each.pp}ep{each.ep}etp{each.etp}cp{each.cp}")
def test_every_rank_of_a_job_finds_its_file_and_its_experts_in_it(layout):
    ranks = simulate(layout)
    files = {file.folder: file for file in rank_files(MOE, layout)}
    assert files.keys() == ranks.keys()
    for folder, places in ranks.items():
        file = files[folder]
        assert places == {(file.tensor_rank, file.pipeline_rank, file.expert_rank, file.expert_tensor_rank)}


@pytest.mark.parametrize("layout", [*GRID[::7], ParallelLayout(pp=2, vpp=2), ParallelLayout(pp=3, pp_layout=(1, 2, 1))])
@pytest.mark.parametrize("config", [DENSE, TIED, MOE], ids=["dense", "tied", "moe"])
def test_every_element_is_in_a_file(config, layout):
    if layout.ep > 1 and not config.is_moe:
        return
    held: dict[Any, set[Shard]] = defaultdict(set)
    for file in rank_files(config, layout):
        for chunk in file.chunks:
            assert len({tensor.name for tensor in chunk.tensors}) == len(chunk.tensors)
            for tensor in chunk.tensors:
                held[tensor.parameter].add(tensor.shard)
                whole = list(tensor.parameter.shape)
                if tensor.vocabulary_rows:
                    whole[0] = tensor.vocabulary_rows
                if tensor.parameter.family.shard_axis is not None:
                    whole[tensor.parameter.family.shard_axis] //= tensor.shard.size
                assert tensor.shape == tuple(whole)
    assert held.keys() == set(parameters(config))
    for shards in held.values():
        (size,) = {shard.size for shard in shards}
        assert {shard.rank for shard in shards} == set(range(size))


def test_a_tied_model_has_a_copy_of_its_embedding_in_the_last_stage_only():
    names = {
        (file.folder, chunk.key): [tensor.name for tensor in chunk.tensors if tensor.vocabulary_rows]
        for file in rank_files(TIED, ParallelLayout(pp=2, vpp=2))
        for chunk in file.chunks
    }
    assert names == {
        ("mp_rank_00_000", "model0"): ["embedding.word_embeddings.weight"],
        ("mp_rank_00_000", "model1"): [],
        ("mp_rank_00_001", "model0"): [],
        ("mp_rank_00_001", "model1"): ["output_layer.weight"],
    }
    (alone,) = rank_files(TIED, ParallelLayout())
    assert "output_layer.weight" not in {tensor.name for tensor in alone.chunks[0].tensors}


@pytest.mark.parametrize(
    ("config", "layout", "words"),
    [
        (MOE, ParallelLayout(tp=2, etp=4), "etp=4 does not divide tp=2"),
        (MOE, ParallelLayout(etp=2), "etp=2 does not divide tp=1"),
        (MOE, ParallelLayout(ep=3), "ep=3"),
        (DENSE, ParallelLayout(ep=2), "mixture of experts"),
        (DENSE, ParallelLayout(tp=3), "tp=3"),
        (DENSE, ParallelLayout(pp=3), "pp_layout 2,1,1"),
        (DENSE, ParallelLayout(pp=2, pp_layout=(1, 2)), "sums to 3"),
        (DENSE, ParallelLayout(vpp=2), "vpp=2 needs pp > 1"),
        (DENSE, ParallelLayout(tp=0), "tp=0"),
    ],
)
def test_layouts_that_do_not_fit_are_refused_before_anything_is_written(config, layout, words, tmp_path):
    write_tiny_hf(tmp_path / "hf", config)
    with pytest.raises(ConfigError, match=words):
        import_hf(tmp_path / "hf", tmp_path / "out", ckpt_format="torch", layout=layout, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("shards", [1, 2, 3])
def test_runs_of_rows_put_shards_together(pieces, shards):
    whole = torch.arange(12 * shards * pieces // 2)
    size = len(whole) // (shards * pieces)
    blocks = whole.view(pieces, shards, size)
    parts = [blocks[:, shard].reshape(-1) for shard in range(shards)]
    for begin, end in product(range(len(whole) + 1), repeat=2):
        if begin <= end:
            runs = shard_runs(begin, end, len(whole), shards, pieces)
            found = [row for shard, low, high in runs for row in parts[shard][low:high].tolist()]
            assert found == whole[begin:end].tolist()


# ---- folders that are wrong ----


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
    monkeypatch.setattr("megatron_qwen.conversion.legacy_files.open_torch_file", lambda *_: pytest.fail("opened"))
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


def test_layers_of_two_dtypes_are_refused(folder):
    path = folder("dense")
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    for rank in ("mp_rank_00_000", "mp_rank_01_000"):
        change(path, rank, lambda content: content["model"].update({name: content["model"][name].bfloat16()}))
    refuse(path, MismatchError, "bfloat16", "float32")


def test_padding_of_the_vocabulary_is_to_a_multiple_of_tp():
    assert [vocabulary_rows(DENSE, ParallelLayout(tp=tp)) for tp in (1, 2, 4)] == [131, 132, 132]


# ---- Hugging Face folders with pickled weights ----


def pickle_folder(source: Path, target: Path, *, shards: int = 1) -> None:
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / "model.safetensors")
    names = list(tensors)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return
    weight_map = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, target / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_convert_with_the_flag_only(good, shards, tmp_path):
    original = good["dense"].parent / "hf"
    pickle_folder(original, tmp_path / "bin", shards=shards)
    with pytest.raises(UnsafeInputError, match="--allow-pickle"):
        import_hf(tmp_path / "bin", tmp_path / "mg", progress=False)
    import_hf(tmp_path / "bin", tmp_path / "mg", progress=False, allow_pickle=True)
    export_hf(tmp_path / "mg", tmp_path / "back", progress=False)
    left, right = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "back"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_pickled_weights_are_checked_like_safetensors(good, tmp_path):
    pickle_folder(good["dense"].parent / "hf", tmp_path / "bin", shards=3)
    index = tmp_path / "bin" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for value, error in (("../x.bin", UnsafeInputError), ("model.safetensors", UnsafeInputError)):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], first: value}}))
        with pytest.raises(error):
            HfFolder(tmp_path / "bin", allow_pickle=True)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "more": content["weight_map"][first]}}))
    with pytest.raises(IncompleteInputError, match="more"):
        HfFolder(tmp_path / "bin", allow_pickle=True)


def test_safetensors_are_taken_where_both_are_there(good, tmp_path):
    shutil.copytree(good["dense"].parent / "hf", tmp_path / "both")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"not opened")
    assert HfFolder(tmp_path / "both", allow_pickle=True).plan().target_bytes > 0
