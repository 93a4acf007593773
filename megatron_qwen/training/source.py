"""What a recipe's `model.source` stands for: configuration, weights, tokenizer, files for the export."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_qwen.checkpoint.atomic import commit, make_staging
from megatron_qwen.errors import ConfigError, IncompleteInputError
from megatron_qwen.model.config import DualChunkAttention, QwenConfig
from megatron_qwen.training.recipe import ModelRecipe, Recipe

if TYPE_CHECKING:
    from megatron_qwen.data.tokenizer import QwenTokenizer

HF_FOLDER = "hf"
"""Inside a run: config.json, tokenizer files and generation_config.json, for the export."""

# What `convert export` and people need next to the weights; everything else in a model folder is not ours to carry.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

_TINY = QwenConfig(
    model_type="qwen2",
    vocab_size=128,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=10_000.0,
    # Qwen's 0.02 suits widths of thousands. At this width it learns slowly: after 80 steps of 2,048 tokens of Python
    # sources the loss was 5.56 with 0.02 and 4.99 with 0.06 (unigram entropy 6.47).
    initializer_range=0.06,
)
TINY_MODELS = {
    "tiny": _TINY,
    "tiny-moe": dataclasses.replace(
        _TINY,
        model_type="qwen2_moe",
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        shared_expert_intermediate_size=192,
        router_aux_loss_coef=0.001,
    ),
}
"""Models that learn something within minutes on a CPU; their vocabulary is the tokenizer's."""

# Embedding rows split over any tensor-parallel size up to this one.
_TINY_VOCAB_MULTIPLE = 64


@dataclass(frozen=True)
class ModelSource:
    """A resolved `model.source`.

    Attributes:
        config: of the model.
        weights: Hugging Face or Megatron folder to start from; None starts from random weights.
        hf_folder: folder with config and tokenizer files to carry to the export, if the source is one.
        tokenizer: of the data and the model.
        tokenizer_path: where it was read.
        allow_pickle: open weights that are pickles (per-rank folders, pytorch_model.bin), as plain data.
    """

    config: QwenConfig
    weights: Path | None
    hf_folder: Path | None
    tokenizer: QwenTokenizer
    tokenizer_path: Path
    allow_pickle: bool = False


def resolve_source(recipe: Recipe, *, allow_pickle: bool = False) -> ModelSource:
    """Find configuration, weights and tokenizer of a recipe, without reading a weight.

    Args:
        recipe: what to run.
        allow_pickle: whether the weights may be pickles; they are opened as plain data, and no code in them runs.

    Raises:
        ConfigError: no such preset or folder, no tokenizer, or one with more tokens than the model has rows.
        IncompleteInputError, CorruptInputError: a folder lacks files or they are damaged.
    """
    from megatron_qwen.data.tokenizer import QwenTokenizer

    name = recipe.model.source
    folder = None if name in TINY_MODELS else _existing_folder(name)
    hf_folder = None if folder is None else (folder if (folder / "config.json").is_file() else folder / HF_FOLDER)
    tokenizer_path = Path(recipe.data.tokenizer) if recipe.data.tokenizer else hf_folder
    if tokenizer_path is None:
        raise ConfigError(
            f"data.tokenizer: not given, and model {name!r} brings none; expected a folder with tokenizer.json "
            "(`megatron-qwen data tokenizer` makes one), given by --tokenizer"
        )
    tokenizer = QwenTokenizer.load(tokenizer_path)
    if folder is not None:
        from megatron_qwen.conversion.loading import read_config

        config = read_config(folder)
    elif name in TINY_MODELS:
        rows = -(-tokenizer.vocab_size // _TINY_VOCAB_MULTIPLE) * _TINY_VOCAB_MULTIPLE
        eod = tokenizer.eod_id
        config = dataclasses.replace(TINY_MODELS[name], vocab_size=rows, bos_token_id=eod, eos_token_id=eod)
    else:
        config = QwenConfig.from_preset(name)
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{tokenizer_path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model {name!r} has "
            f"{config.vocab_size:,} embedding rows; use the model's own, or `--model tiny`, which takes its size"
        )
    config = _with_dual_chunk_attention(config, recipe.model)
    return ModelSource(config, folder, hf_folder, tokenizer, tokenizer_path, allow_pickle)


def _with_dual_chunk_attention(config: QwenConfig, model: ModelRecipe) -> QwenConfig:
    """Return the configuration with the recipe's Dual Chunk Attention in place of its own, if it has one."""
    if model.dca_chunk_size is None:
        return config
    chunk, local, original = model.dca_chunk_size, model.dca_local_size, model.dca_original_length
    block = None
    if chunk:
        block = DualChunkAttention(
            chunk_size=chunk,
            local_size=max(chunk // 16, 1) if local is None else local,
            original_max_position_embeddings=config.max_position_embeddings if original is None else original,
            cap=model.dca_cap,
        )
    return dataclasses.replace(config, dual_chunk_attention=block)


def _existing_folder(name: str) -> Path | None:
    """Return the folder `name` stands for, None for the name of a preset."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ConfigError(f"model.source: {name} is a file; expected a Hugging Face or Megatron checkpoint folder")
    if "/" in name.removeprefix("Qwen/") or name.startswith((".", "~")):
        raise IncompleteInputError(f"model.source: folder {name} does not exist")
    return None


def write_hf_folder(source: ModelSource, run_folder: Path) -> None:
    """Put config.json and the tokenizer's files into `run_folder/hf`, unless they are there. For rank 0."""
    target = run_folder / HF_FOLDER
    if target.exists():
        return
    staging = make_staging(target)
    config = source.config.to_hf()
    if source.hf_folder is not None:
        # The source's own file keeps entries that mean nothing to us, but no attention that was switched off.
        own = json.loads((source.hf_folder / "config.json").read_text(encoding="utf-8"))
        own.pop("dual_chunk_attention_config", None)
        config = own | config
    (staging / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.tokenizer_path.is_dir():
        for name in _TOKENIZER_FILES:
            if (source.tokenizer_path / name).is_file():
                shutil.copyfile(source.tokenizer_path / name, staging / name)
    if not (staging / "tokenizer.json").is_file():
        source.tokenizer.save(staging)
    commit(staging, target)
