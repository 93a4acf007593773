"""Reading and writing a Hugging Face config.json, without dropping a field in silence.

Every key of the file is of one of four kinds: a field of `QwenConfig`; a switch whose only supported
value is checked; inert (kept in `QwenConfig.inert_fields` and written back); or unknown. An unknown
key that resembles a known one is an error, any other is named in one logged warning.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError, IncompleteInputError
from megatron_qwen.model.config import MODEL_TYPES, DualChunkAttention, QwenConfig, YarnScaling
from megatron_qwen.strict_json import read_strict_json

logger = logging.getLogger(__name__)

MAX_CONFIG_BYTES = 16 * 2**20
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}

_REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_REQUIRED_MOE = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
# What transformers takes for an absent key; each use of one is logged.
_DEFAULTS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_DEFAULTS_MOE: dict[str, Any] = {
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
}
# Switches of which one setting is implemented: key -> (settings taken, what another one means).
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "another activation function"),
    "use_sliding_window": (
        (False, None),
        "sliding-window attention, which is not implemented; set it to false if trained so",
    ),
    "qkv_bias": ((True,), "projections without bias"),
    "attention_bias": ((True,), "projections without bias"),
    "mlp_bias": ((False,), "an MLP with bias"),
    "shared_expert_gate": ((True,), "shared experts without their gate"),
    "expert_interval": ((1,), "MoE layers at intervals; say it as decoder_sparse_step"),
    "is_encoder_decoder": ((False,), "an encoder-decoder model"),
    "add_cross_attention": ((False,), "cross-attention"),
    "partial_rotary_factor": ((1.0, None), "rotation of a part of each head"),
    "use_mrope": ((False, None), "multimodal rotary embedding"),
    "use_qk_norm": ((False, None), "normalised queries and keys"),
    "rope_interleaved": ((False, None), "interleaved rotary embedding"),
    "pruned_heads": (({}, None), "pruned attention heads"),
}
# Neither shapes nor arithmetic of the model depend on these.
# fmt: off
_INERT = frozenset((
    "architectures", "auto_map", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "is_decoder", "label2id", "length_penalty", "max_length",
    "max_window_layers", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
    "pad_token_id", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "seq_length", "sliding_window", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
    "top_p", "torchscript", "transformers_version", "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16",
    "use_cache",
))
# fmt: on
# Inert keys worth writing back; the rest are leftovers of a training or saving tool.
_EXPORTED_INERT = ("max_window_layers", "output_router_logits", "pad_token_id", "sliding_window", "use_cache")
# fmt: off
_HANDLED = frozenset((
    "dtype", "dual_chunk_attention_config", "head_dim", "layer_types", "quantization_config", "rope_parameters",
    "rope_scaling", "rope_theta", "torch_dtype",
))
# fmt: on


def config_from_hf(source: str | Path | Mapping[str, Any]) -> QwenConfig:
    """Return the configuration in a Hugging Face folder, a config.json, or its parsed content.

    Raises:
        ConfigError: see `QwenConfig.from_hf`.
        IncompleteInputError, CorruptInputError: no config.json, or it is not a JSON object.
    """
    where, content = ("config", dict(source)) if isinstance(source, Mapping) else _read_json(Path(source))
    _require_supported_architecture(where, content)
    is_moe = content["model_type"] == "qwen2_moe"
    given_theta, rope_scaling = _read_rope(where, content)
    required = _REQUIRED + (_REQUIRED_MOE if is_moe else ())
    rope_theta = _require_all_present(where, content, required, given_theta)
    _require_supported_switches(where, content)
    values: dict[str, Any] = {name: content[name] for name in required}
    values |= _with_defaults(where, content, _DEFAULTS | (_DEFAULTS_MOE if is_moe else {}))
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if isinstance(values["eos_token_id"], list):
        values["eos_token_id"] = tuple(values["eos_token_id"])
    if is_moe:
        values["mlp_only_layers"] = tuple(values["mlp_only_layers"] or ())
    try:
        return QwenConfig(
            model_type=content["model_type"],
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            dual_chunk_attention=dual_chunk_attention_from_hf(where, content.get("dual_chunk_attention_config")),
            torch_dtype=_read_dtype(where, content),
            inert_fields=_sort_out_remaining(where, content, is_moe),
            **values,
        )
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def config_to_hf(config: QwenConfig) -> dict[str, Any]:
    """Return the content of a config.json.

    Rotary settings and dtype are written under both names: transformers 4 reads `rope_theta`,
    `rope_scaling` and `torch_dtype`, transformers 5 `rope_parameters` and `dtype`, and each falls back
    to a default without a word when its own name is missing.
    """
    eos = config.eos_token_id
    names = _REQUIRED + tuple(_DEFAULTS) + ((_REQUIRED_MOE + tuple(_DEFAULTS_MOE)) if config.is_moe else ())
    content: dict[str, Any] = {"architectures": [ARCHITECTURES[config.model_type]], "model_type": config.model_type}
    content |= {name: getattr(config, name) for name in names}
    content["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
    if config.is_moe:
        content["mlp_only_layers"] = list(config.mlp_only_layers)
    content |= {"hidden_act": "silu", "use_sliding_window": False, "use_cache": True}
    content |= {name: config.inert_fields[name] for name in _EXPORTED_INERT if name in config.inert_fields}
    scaling = _rope_scaling_to_hf(config.rope_scaling)
    content["rope_theta"] = config.rope_theta
    content["rope_scaling"] = scaling
    content["rope_parameters"] = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    if config.dual_chunk_attention is not None:
        content["dual_chunk_attention_config"] = dual_chunk_attention_to_hf(config.dual_chunk_attention)
    return content | {"torch_dtype": config.torch_dtype, "dtype": config.torch_dtype}


def _read_json(path: Path) -> tuple[str, dict[str, Any]]:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise IncompleteInputError(
            f"{file}: no such file; expected a Hugging Face folder with config.json, or that file"
        )
    content = read_strict_json(file, max_bytes=MAX_CONFIG_BYTES)
    return str(file), content


def _require_supported_architecture(where: str, content: Mapping[str, Any]) -> None:
    found_type, found = content.get("model_type"), content.get("architectures")
    supported = ", ".join(f"{kind} ({name})" for kind, name in ARCHITECTURES.items())
    if found_type not in MODEL_TYPES or (found and not set(found) & set(ARCHITECTURES.values())):
        raise ConfigError(f"{where}: model_type {found_type!r}, architectures {found}; supported: {supported}")
    if found and ARCHITECTURES[found_type] not in found:
        raise ConfigError(
            f"{where}: model_type {found_type!r} contradicts architectures {found}; supported: {supported}"
        )
    quantization = content.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"{where}: the weights are quantised ({method}); supported: unquantised {supported} weights. "
            "Use the original checkpoint it was made from."
        )


def _require_all_present(
    where: str, content: Mapping[str, Any], names: tuple[str, ...], rope_theta: float | None
) -> float:
    missing = [name for name in names if name not in content]
    if rope_theta is None:
        missing.append("rope_theta (or rope_parameters.rope_theta)")
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}; take the values from the original checkpoint")
    assert rope_theta is not None
    return rope_theta


def _require_supported_switches(where: str, content: Mapping[str, Any]) -> None:
    problems = [
        f"{name} is {content[name]!r}: {meaning} (supported: {taken[0]!r})"
        for name, (taken, meaning) in _FIXED.items()
        if name in content and content[name] not in taken
    ]
    kinds = set(content.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        problems.append(f"layer_types contains {sorted(kinds)}: supported is 'full_attention' in every layer")
    hidden, heads, head_dim = (content.get(name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if head_dim is not None and isinstance(heads, int) and hidden != heads * head_dim:
        problems.append(f"head_dim {head_dim} is not hidden_size / num_attention_heads = {hidden} / {heads}")
    if problems:
        raise ConfigError(f"{where}: " + "; ".join(problems))


def _read_rope(where: str, content: Mapping[str, Any]) -> tuple[float | None, YarnScaling | None]:
    new, old = content.get("rope_parameters"), content.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{where}: {name} is {value!r}, expected an object or null")
    thetas = {
        float(block["rope_theta"]) for block in (content, new or {}, old or {}) if block.get("rope_theta") is not None
    }
    if len(thetas) > 1:
        raise ConfigError(f"{where}: rope_theta is given as {sorted(thetas)}; keep the one the model was trained with")
    length = content.get("max_position_embeddings")
    scalings = [_read_rope_scaling(where, block, length) for block in (new, old) if block]
    if len(scalings) > 1 and scalings[0] != scalings[1]:
        raise ConfigError(f"{where}: rope_parameters {new} contradicts rope_scaling {old}; keep one of them")
    return (thetas.pop() if thetas else None), (scalings[0] if scalings else None)


def _read_rope_scaling(where: str, block: Mapping[str, Any], max_position_embeddings: Any) -> YarnScaling | None:
    kind = block.get("rope_type", block.get("type", "default"))
    values = {name: value for name, value in block.items() if name not in ("rope_type", "type", "rope_theta")}
    if values.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{where}: partial_rotary_factor {block['partial_rotary_factor']}: supported is 1.0")
    if kind == "default":
        if values:
            raise ConfigError(
                f'{where}: rope_type \'default\' with {values}; say "rope_type": "yarn" if they are meant'
            )
        return None
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_type {kind!r}; supported: 'default', 'yarn'")
    known = {spec.name for spec in dataclasses.fields(YarnScaling)}
    unknown, missing = sorted(set(values) - known), "factor" not in values
    if unknown or missing:
        found = f"unknown {', '.join(unknown)}" if unknown else "factor is missing"
        raise ConfigError(f"{where}: rope scaling 'yarn': {found}; known: {', '.join(sorted(known))}")
    # transformers takes its default for null or 0 in these two, and the present length for an absent trained length.
    values["beta_fast"] = values.get("beta_fast") or 32.0
    values["beta_slow"] = values.get("beta_slow") or 1.0
    values.setdefault("original_max_position_embeddings", max_position_embeddings)
    return YarnScaling(**values)


def _rope_scaling_to_hf(scaling: YarnScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = _without_none(dataclasses.asdict(scaling))
    if values.pop("truncate") is False:
        values["truncate"] = False
    return {"rope_type": "yarn", **values}


def dual_chunk_attention_from_hf(where: str, block: Any) -> DualChunkAttention | None:
    """Return the settings in a `dual_chunk_attention_config`, None for null.

    Args:
        where: the file, for messages.
        block: the entry's value.

    Raises:
        ConfigError: not an object, misspelt, missing or contradictory entries.
    """
    if not block:
        return None
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: dual_chunk_attention_config is {block!r}, expected an object or null")
    known = {spec.name for spec in dataclasses.fields(DualChunkAttention)} - {"other_fields"}
    other = {name: value for name, value in block.items() if name not in known}
    for name in other:
        # The sparse prefill has entries of its own, whose names resemble ours.
        close = [] if name.startswith("sparse_attention_") else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if close:
            raise ConfigError(
                f"{where}: dual_chunk_attention_config: unknown field {name!r}. Did you mean {close[0]!r}?"
            )
    missing = [name for name in ("chunk_size", "local_size") if block.get(name) is None]
    if missing:
        raise ConfigError(
            f"{where}: dual_chunk_attention_config has {sorted(block)}; missing: {', '.join(missing)}; "
            f"known: {', '.join(sorted(known))}"
        )
    if other:
        logger.info("%s: dual_chunk_attention_config: kept for export, not used: %s", where, ", ".join(sorted(other)))
    values = {name: value for name, value in block.items() if name in known and value is not None}
    return DualChunkAttention(**values, other_fields=other)


def dual_chunk_attention_to_hf(chunks: DualChunkAttention) -> dict[str, Any]:
    """Return the `dual_chunk_attention_config` of these settings."""
    values = _without_none(dataclasses.asdict(chunks))
    other = values.pop("other_fields")
    if values["cap"] == "released":  # what every reader of the files takes
        del values["cap"]
    return {**values, **other}


def _read_dtype(where: str, content: Mapping[str, Any]) -> str:
    given = {
        str(content[name]).removeprefix("torch.") for name in ("dtype", "torch_dtype") if content.get(name) is not None
    }
    if len(given) > 1:
        raise ConfigError(f"{where}: dtype {content['dtype']!r} contradicts torch_dtype {content['torch_dtype']!r}")
    if not given:
        logger.warning("%s: no dtype (torch_dtype); taking bfloat16, the released models' dtype", where)
    return given.pop() if given else "bfloat16"


def _with_defaults(where: str, content: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    absent = {name: default for name, default in defaults.items() if name not in content}
    if absent:
        logger.info("%s: not given, taking transformers' defaults: %s", where, absent)
    return {name: content.get(name, default) for name, default in defaults.items()}


def _sort_out_remaining(where: str, content: Mapping[str, Any], is_moe: bool) -> dict[str, Any]:
    """Return the inert entries; refuse what looks misspelt and log what is unknown."""
    fields = {*_REQUIRED, *_REQUIRED_MOE, *_DEFAULTS, *_DEFAULTS_MOE}
    taken = {*_HANDLED, *_FIXED, *_INERT, *fields}
    ignored = [name for name in content if name in {*_REQUIRED_MOE, *_DEFAULTS_MOE}] if not is_moe else []
    for name in content:
        if name in taken or name.startswith("_"):
            continue
        close = difflib.get_close_matches(name, taken - _INERT, n=1, cutoff=0.8)
        if close:
            raise ConfigError(f"{where}: unknown field {name!r}. Did you mean {close[0]!r}?")
        ignored.append(name)
    if ignored:
        logger.warning(
            "%s: fields that this model type does not have are ignored: %s", where, ", ".join(sorted(ignored))
        )
    inert = {name: content[name] for name in _EXPORTED_INERT if name in content}
    if inert.get("sliding_window") is not None or inert.get("max_window_layers") is not None:
        logger.info("%s: sliding_window and max_window_layers have no effect (use_sliding_window is false)", where)
    return inert


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
