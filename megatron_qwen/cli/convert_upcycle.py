"""`megatron-qwen convert upcycle`: a Qwen MoE made from a dense checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.cli.convert_options import (
    DryRun,
    Dtype,
    Json,
    MaxMemory,
    Overwrite,
    Resume,
    ShardSize,
    Threads,
    Verify,
    conversion_options,
)
from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.conversion.upcycle import UpcyclingRecipe
    from megatron_qwen.model.config import QwenConfig

_RECIPE = "Recipe"

_Experts = Annotated[int, typer.Option(help="Routed experts per MoE layer.", rich_help_panel=_RECIPE)]
_Topk = Annotated[int, typer.Option(help="Experts per token.", rich_help_panel=_RECIPE)]
_Granularity = Annotated[int | None, typer.Option(help="Experts that one dense MLP is worth.", rich_help_panel=_RECIPE)]
_ExpertWidth = Annotated[
    int | None, typer.Option(help="Neurons of an expert, instead of --granularity.", rich_help_panel=_RECIPE)
]
_SharedWidth = Annotated[
    int | None, typer.Option(help="Neurons of the shared expert; default: topk experts.", rich_help_panel=_RECIPE)
]
_Reinit = Annotated[float, typer.Option(help="Share of each expert's parameters drawn anew.", rich_help_panel=_RECIPE)]
_ReinitStd = Annotated[
    float | None, typer.Option(help="Their deviation; default: initializer_range.", rich_help_panel=_RECIPE)
]
_ReinitUnit = Annotated[
    str, typer.Option(help="parameter: single values; neuron: whole neurons.", rich_help_panel=_RECIPE)
]
_ReinitShared = Annotated[
    bool, typer.Option("--reinit-shared", help="Also in the shared expert.", rich_help_panel=_RECIPE)
]
_ExpertScale = Annotated[float, typer.Option(help="Multiplies what the experts return.", rich_help_panel=_RECIPE)]
_SharedScale = Annotated[
    float, typer.Option(help="Multiplies what the shared expert returns.", rich_help_panel=_RECIPE)
]
_RouterStd = Annotated[
    float | None, typer.Option(help="Deviation of the router; default: initializer_range.", rich_help_panel=_RECIPE)
]
_GateStd = Annotated[
    float | None,
    typer.Option(help="Deviation of the shared expert's gate; default: likewise.", rich_help_panel=_RECIPE),
]
_NormTopk = Annotated[
    bool, typer.Option("--norm-topk-prob", help="Probabilities of the chosen sum to 1.", rich_help_panel=_RECIPE)
]
_AuxLoss = Annotated[float, typer.Option(help="Of the load-balancing loss.", rich_help_panel=_RECIPE)]
_DenseLayers = Annotated[str, typer.Option(help="Layers that stay dense, such as 0,1.", rich_help_panel=_RECIPE)]
_Seed = Annotated[int, typer.Option(help="Of everything random.", rich_help_panel=_RECIPE)]

# Parameters of the command that are arguments of `make_recipe`.
_RECIPE_FIELDS = (
    "num_experts",
    "topk",
    "granularity",
    "expert_width",
    "shared_width",
    "reinit",
    "reinit_std",
    "reinit_unit",
    "reinit_shared",
    "expert_scale",
    "shared_scale",
    "router_std",
    "gate_std",
    "norm_topk_prob",
    "router_aux_loss_coef",
    "seed",
)


def register(group: typer.Typer) -> None:
    """Add the verb `upcycle` to the group `convert`."""
    group.command("upcycle")(upcycle_command)


def upcycle_command(
    context: typer.Context,
    dense_hf: Annotated[Path, typer.Argument(help="Hugging Face folder of a dense Qwen2 or Qwen2.5 model.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder of the MoE model to make.")],
    num_experts: _Experts,
    topk: _Topk,
    granularity: _Granularity = None,
    expert_width: _ExpertWidth = None,
    shared_width: _SharedWidth = None,
    reinit: _Reinit = 0.5,
    reinit_std: _ReinitStd = None,
    reinit_unit: _ReinitUnit = "parameter",
    reinit_shared: _ReinitShared = False,
    expert_scale: _ExpertScale = 1.0,
    shared_scale: _SharedScale = 1.0,
    router_std: _RouterStd = None,
    gate_std: _GateStd = None,
    norm_topk_prob: _NormTopk = False,
    router_aux_loss_coef: _AuxLoss = 0.001,
    dense_layers: _DenseLayers = "",
    seed: _Seed = 0,
    dtype: Dtype = None,
    max_shard_size: ShardSize = "50GB",
    dry_run: DryRun = False,
    verify: Verify = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    max_memory: MaxMemory = None,
    as_json: Json = False,
) -> None:
    """Make a Qwen MoE from a dense checkpoint: copy its MLPs, shuffle, cut into experts, draw half of each anew."""
    from megatron_qwen.cli.convert import run_conversion
    from megatron_qwen.conversion.upcycle import make_recipe, prepare_upcycle
    from megatron_qwen.model.config import QwenConfig

    dense = QwenConfig.from_hf(dense_hf)
    given = {name: context.params[name] for name in _RECIPE_FIELDS}
    recipe = make_recipe(dense, **{**given, "dense_layers": _numbers(dense_layers)})
    conversion = prepare_upcycle(dense_hf, out, recipe, **conversion_options(context.params))
    figures = _figures(dense, recipe)
    if not as_json:
        _print(figures)
        run_conversion(conversion, is_dry=dry_run, as_json=False)
        return
    report = conversion.dry_run() if dry_run else conversion.run()
    typer.echo(json.dumps({"model": figures, **report.to_json()}, indent=2))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"--dense-layers: got {text!r}, expected numbers of layers such as 0,1") from None


def _figures(dense: QwenConfig, recipe: UpcyclingRecipe) -> dict[str, Any]:
    """Return the model that will be made in figures, and how it comes about."""
    from megatron_qwen.conversion.upcycle import num_copies, upcycled_config
    from megatron_qwen.model.parameters import count_parameters

    moe = upcycled_config(dense, recipe)
    count, before = count_parameters(moe), count_parameters(dense)
    routed = recipe.num_experts * recipe.expert_width
    copies = num_copies(routed, dense.intermediate_size)
    return {
        "parameters_dense": before.total,
        "parameters_total": count.total,
        "parameters_active": count.active,
        "moe_layers": sum(moe.moe_layers()),
        "experts": recipe.num_experts,
        "experts_per_token": recipe.topk,
        "expert_width": recipe.expert_width,
        "shared_expert_width": recipe.shared_width,
        "copies_of_each_mlp": copies,
        "neurons_dropped": copies * dense.intermediate_size - routed,
        "drawn_anew": recipe.reinit,
        "drawn_anew_unit": recipe.reinit_unit,
        "drawn_anew_std": dense.initializer_range if recipe.reinit_std is None else recipe.reinit_std,
        "expert_scale": recipe.expert_scale,
        "shared_scale": recipe.shared_scale,
        "router_std": dense.initializer_range if recipe.router_std is None else recipe.router_std,
        "gate_std": dense.initializer_range if recipe.gate_std is None else recipe.gate_std,
        "seed": recipe.seed,
    }


def _print(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="the MoE model", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    Console().print(table)
