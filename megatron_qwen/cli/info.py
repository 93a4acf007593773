"""`megatron-qwen doctor`, `models` and `flags`: what is here, what can be built, and how Megatron-LM is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron_qwen.doctor import Diagnosis
    from megatron_qwen.model.config import QwenConfig
    from megatron_qwen.model.flags import FlagArrays

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
SourceArgument = Annotated[str, typer.Argument(help="A preset (see `megatron-qwen models`), or a Hugging Face folder.")]
GIB = 1024**3


def register(app: typer.Typer) -> None:
    """Add the verbs of this file."""
    app.command("doctor")(doctor)
    models = typer.Typer(help="The known models with their exact parameter counts.", invoke_without_command=True)
    models.callback()(list_models)
    models.command("show")(show_model)
    app.add_typer(models, name="models")
    app.command("flags")(flags)


def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder to search for half-written outputs.")] = Path(),
    stale: Annotated[list[Path] | None, typer.Option(help="Another folder to search; may be given again.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Report versions, devices, the backend of every part with its reason, and half-written outputs."""
    from megatron_qwen.doctor import diagnose

    diagnosis = diagnose(folder, *(stale or ()))
    if json_output:
        _print_json(diagnosis.as_dict())
    else:
        _print_diagnosis(diagnosis)
    if diagnosis.problems:
        raise typer.Exit(ConfigError.exit_code)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def list_models(context: typer.Context, json_output: JsonOption = False) -> None:
    """List the presets."""
    if context.invoked_subcommand is not None:
        return
    from megatron_qwen.model.presets import PRESETS

    rows = [{"name": name, **_summary(config)} for name, config in PRESETS.items()]
    if json_output:
        _print_json(rows)
        return
    from rich.table import Table

    table = Table(title="Presets")
    table.add_column("name", no_wrap=True)
    for heading in ("parameters", "active", "layers", "hidden", "heads", "experts", "vocabulary", "tied"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        heads = f"{row['num_attention_heads']}/{row['num_key_value_heads']}"
        experts = f"{row['num_experts']}, top {row['num_experts_per_tok']}" if row["num_experts"] else "-"
        table.add_row(
            *(row["name"], f"{row['parameters']:,}", f"{row['active_parameters']:,}"),
            *(str(row["num_hidden_layers"]), str(row["hidden_size"]), heads, experts),
            *(f"{row['vocab_size']:,}", "yes" if row["tie_word_embeddings"] else "no"),
        )
    _print_table(table)


def show_model(source: SourceArgument, json_output: JsonOption = False) -> None:
    """Show one model: every field of its configuration and its parameter counts."""
    config = _read_config(source)
    if json_output:
        _print_json({"source": source, **_summary(config), "config": config.to_hf()})
        return
    from rich.table import Table

    table = Table(title=source, show_header=False)
    counts = {name: f"{value:,}" for name, value in _summary(config).items() if name.endswith("parameters")}
    for name, value in {**counts, **config.to_hf()}.items():
        table.add_row(name, str(value))
    _print_table(table)


def flags(
    source: SourceArgument,
    tp: Annotated[int, typer.Option("--tp", "--tensor-model-parallel-size", help="Tensor parallel size.")] = 1,
    pp: Annotated[int, typer.Option("--pp", "--pipeline-model-parallel-size", help="Pipeline parallel size.")] = 1,
    vpp: Annotated[
        int, typer.Option("--vpp", "--num-virtual-stages-per-pipeline-rank", help="Virtual stages per pipeline rank.")
    ] = 1,
    ep: Annotated[int, typer.Option("--ep", "--expert-model-parallel-size", help="Expert parallel size.")] = 1,
    etp: Annotated[
        int | None,
        typer.Option("--etp", "--expert-tensor-parallel-size", help="Tensor parallel size of experts. (default: tp)"),
    ] = None,
    cp: Annotated[int, typer.Option("--cp", "--context-parallel-size", help="Context parallel size.")] = 1,
    dp: Annotated[
        int | None, typer.Option("--dp", help="Data parallel size. (default: what is left of the GPUs)")
    ] = None,
    sequence_parallel: Annotated[
        bool | None,
        typer.Option("--sequence-parallel/--no-sequence-parallel", help="(default: on where tp > 1)"),
    ] = None,
    pp_layout: Annotated[str | None, typer.Option("--pp-layout", help="Layers of each stage, such as 6,8,8,6.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Number of GPUs. (default: one copy of the model)")] = None,
    seq_length: Annotated[int, typer.Option("--seq-length", help="Tokens per sample.")] = 4096,
    micro_batch_size: Annotated[int, typer.Option("--micro-batch-size", help="Samples per forward pass.")] = 1,
    global_batch_size: Annotated[
        int | None, typer.Option("--global-batch-size", help="Samples per step. (default: one micro-batch per rank)")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    transformer_impl: Annotated[
        str, typer.Option("--transformer-impl", help="transformer_engine or local.")
    ] = "transformer_engine",
    fusions: Annotated[bool, typer.Option("--fusions/--no-fusions", help="Use fused kernels.")] = True,
    spec: Annotated[
        str,
        typer.Option(
            "--spec", help="function: for Megatron-LM 0.19 and newer; object: for older releases; none: Megatron's own."
        ),
    ] = "function",
    recompute: Annotated[str, typer.Option("--recompute", help="none, selective or full.")] = "none",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Folder with the tokenizer files.")] = None,
    output_format: Annotated[str, typer.Option("--format", help="bash, json or args.")] = "bash",
) -> None:
    """Print the exact Megatron-LM flags of a model for an unmodified pretrain_gpt.py."""
    from megatron_qwen.model.flags import LaunchSettings, megatron_lm_flags
    from megatron_qwen.parallel.layout import ParallelLayout

    if output_format not in ("bash", "json", "args"):
        raise ConfigError(f"--format: got {output_format!r}, expected bash, json or args")
    layout = ParallelLayout(
        tp=tp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        cp=cp,
        dp=dp,
        sequence_parallel=tp > 1 if sequence_parallel is None else sequence_parallel,
        pp_layout=None if pp_layout is None else ParallelLayout.parse_pp_layout(pp_layout),
    )
    settings = LaunchSettings(
        layout=layout,
        world_size=_one_copy(layout) if gpus is None else gpus,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        dtype=dtype,
        transformer_impl=transformer_impl,
        fusions=fusions,
        spec=spec,
        recompute=recompute,
        tokenizer=tokenizer or _own_tokenizer(source),
    )
    _print_flags(megatron_lm_flags(_read_config(source), settings), output_format)


def _one_copy(layout: Any) -> int:
    """The fewest GPUs that hold dense parameters and experts once, in whole data-parallel replicas."""
    import math

    return math.lcm(layout.model_parallel_size, layout.expert_tensor_parallel_size * layout.ep * layout.pp) * (
        layout.dp or 1
    )


def _own_tokenizer(source: str) -> str | None:
    """A Hugging Face folder with a tokenizer is its own --tokenizer."""
    return source if (Path(source) / "tokenizer.json").is_file() else None


def _read_config(source: str) -> QwenConfig:
    from megatron_qwen.model.config import QwenConfig

    if Path(source).exists():
        return QwenConfig.from_hf(source)
    return QwenConfig.from_preset(source)


def _summary(config: QwenConfig) -> dict[str, Any]:
    from megatron_qwen.model.parameters import count_parameters

    count = count_parameters(config)
    names = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"]
    names += ["num_experts", "num_experts_per_tok", "vocab_size", "tie_word_embeddings"]
    return {
        "parameters": count.total,
        "active_parameters": count.active,
        "non_embedding_parameters": count.non_embedding,
        **{name: getattr(config, name) for name in names},
    }


def _print_flags(arrays: FlagArrays, output_format: str) -> None:
    import shlex

    if output_format == "args":
        for note in arrays.notes:
            sys.stderr.write(f"note: {note}\n")
        sys.stdout.write(shlex.join(arrays.words()) + "\n")
    else:
        sys.stdout.write((arrays.as_json() if output_format == "json" else arrays.as_bash()) + "\n")


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _print_table(*tables: Any) -> None:
    """Print rich tables; where stdout is no terminal, as wide as they need, so that no value is cut."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 200
    for table in tables:
        console.print(table)


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    from rich.markup import escape
    from rich.table import Table

    packages = Table(title=f"Python {diagnosis.python} on {diagnosis.platform}")
    for heading in ("package", "version", "without it"):
        packages.add_column(heading, no_wrap=heading != "without it")
    for package in diagnosis.packages:
        missing = "[red]missing[/red]" if package.required else "not installed"
        packages.add_row(package.name, package.version or missing, "" if package.version else package.consequence)

    devices = Table(title="Devices", show_header=False)
    memory = f"{diagnosis.memory_bytes / GIB:.0f} GiB"
    devices.add_row("CPU", f"{diagnosis.cpu}, {diagnosis.cpu_cores} cores, {memory}")
    for gpu in diagnosis.gpus:
        size = f"{gpu['memory_bytes'] / GIB:.0f} GiB"
        devices.add_row("GPU", f"{gpu['name']}, {size}, compute capability {gpu['compute_capability']}")
    if not diagnosis.gpus:
        devices.add_row("GPU", "none")
    devices.add_row("nvcc", diagnosis.nvcc or "not found")

    choices = Table(title="What each part would use")
    for heading in ("part", "backend", "why"):
        choices.add_column(heading)
    for choice in diagnosis.choices:
        choices.add_row(choice.part, choice.backend, escape(choice.reason))

    leftovers = Table(title=f"half-written outputs under {escape(', '.join(diagnosis.searched))}")
    for heading in ("path", "size", "last written", "what to do"):
        leftovers.add_column(heading, overflow="fold")
    for found in diagnosis.leftovers:
        size = f"{found.num_bytes / 1e6:,.1f} MB"
        leftovers.add_row(escape(found.path), size, _age(found.age_seconds), escape(found.advice))
    if not diagnosis.leftovers:
        leftovers.add_row("none", "", "", "")
    _print_table(packages, devices, choices, leftovers, *(f"[red]{escape(line)}[/red]" for line in diagnosis.problems))
