"""Recipes from and to text: `--set group.field=value`, YAML and JSON files, and the diff of two recipes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_qwen.errors import ConfigError
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.recipe_group import RecipeGroup


def recipe_to_dict(recipe: RecipeGroup) -> dict[str, Any]:
    """Return the recipe as plain dictionaries, lists and scalars (JSON and YAML alike)."""
    values = {each.name: getattr(recipe, each.name) for each in dataclasses.fields(recipe)}  # type: ignore[arg-type]
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, RecipeGroup):
        return recipe_to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def recipe_from_dict(values: Mapping[str, Any], base: Recipe | None = None) -> Recipe:
    """Return `base` (default: a Recipe of defaults) with the given fields replaced.

    Args:
        values: nested mapping as `recipe_to_dict` returns it; fields may be left out.
        base: the recipe whose fields stay where `values` says nothing.

    Raises:
        ConfigError: an unknown field (with the nearest known one), a value of the wrong type, or a
            combination the recipe refuses.
    """
    return typing.cast(Recipe, _replace_fields(base or Recipe(), values, prefix=""))


def _replace_fields(group: RecipeGroup, values: Mapping[str, Any], prefix: str) -> RecipeGroup:
    hints = typing.get_type_hints(type(group))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        if name not in hints:
            raise ConfigError(_unknown_field(path))
        present = getattr(group, name)
        if isinstance(present, RecipeGroup):
            if not isinstance(value, Mapping):
                raise ConfigError(f"recipe field {path}: got {value!r}, expected a group of fields")
            changes[name] = _replace_fields(present, value, f"{path}.")
        else:
            changes[name] = coerce(value, hints[name], path)
    return dataclasses.replace(group, **changes)  # type: ignore[type-var]


def apply_overrides(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Apply `group.field=value` texts, all at once, so that fields that only fit together can change together.

    Raises:
        ConfigError: an assignment without `=`, an unknown field, a value of the wrong type, or a
            combination the recipe refuses.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: expected group.field=value, such as optimizer.lr=1e-4")
        *groups, name = path.strip().split(".")
        target = values
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ConfigError(_unknown_field(path.strip()))
        target[name] = _parse_text(text.strip())
    return recipe_from_dict(values, recipe)


def _parse_text(text: str) -> Any:
    if text in ("", "null", "None"):
        return None
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text
    # "3,5" is how people write lists on a command line; YAML reads it as the text it is.
    if isinstance(value, str) and "," in text:
        return _CommaText(text)
    return text if isinstance(value, dict) else value


class _CommaText(str):
    """Text with commas: a list where the field is one, itself where the field is text."""

    __slots__ = ()


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Return `value` as the type `hint`, refusing what would lose or invent information.

    Raises:
        ConfigError: the value does not fit, naming the field and the expected type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = [argument for argument in arguments if argument is not type(None)]
        return coerce(value, hint, path)
    if origin is tuple:
        return _coerce_tuple(value, arguments, hint, path)
    if hint is str and value is not None and not isinstance(value, (list, Mapping)):
        return str(value)
    if hint is bool and isinstance(value, bool):
        return value
    if (
        hint is int
        and not isinstance(value, bool)
        and _as_number(value) is not None
        and float(value) == int(float(value))
    ):
        return int(float(value)) if not isinstance(value, int) else value
    if hint is float and _as_number(value) is not None:
        return float(value)
    raise ConfigError(f"recipe field {path}: got {value!r}, expected {_type_name(hint)}")


def _coerce_tuple(value: Any, arguments: tuple[Any, ...], hint: Any, path: str) -> Any:
    if isinstance(value, _CommaText):
        value = [_parse_text(part.strip()) for part in value.split(",")]
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool) and arguments[-1] is Ellipsis:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"recipe field {path}: got {value!r}, expected {_type_name(hint)}")
    if arguments[-1] is Ellipsis:
        return tuple(coerce(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    if len(value) != len(arguments):
        raise ConfigError(f"recipe field {path}: got {value!r}, expected {_type_name(hint)}")
    return tuple(coerce(item, each, path) for item, each in zip(value, arguments, strict=True))


def _as_number(value: Any) -> float | None:
    # YAML 1.1 reads 1e-5 (without a dot) as text.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if number - number == 0 else None


def _type_name(hint: Any) -> str:
    if hint is Ellipsis:
        return "..."
    if typing.get_origin(hint) is tuple:
        return f"a list of ({', '.join(_type_name(each) for each in typing.get_args(hint))})"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, str(hint))


def field_paths() -> list[str]:
    """Return every field as `group.field`, in the order of the recipe."""
    recipe = Recipe()
    paths = []
    for each in dataclasses.fields(recipe):
        value = getattr(recipe, each.name)
        inner = dataclasses.fields(value) if isinstance(value, RecipeGroup) else ()  # type: ignore[arg-type]
        paths += [f"{each.name}.{field.name}" for field in inner] or [each.name]
    return paths


def _unknown_field(path: str) -> str:
    paths = field_paths()
    name = path.rpartition(".")[2]
    close = [each for each in paths if each.rpartition(".")[2] == name]
    close = close or difflib.get_close_matches(path, paths, n=3, cutoff=0.6)
    if not close:
        nearest = difflib.get_close_matches(name, [each.rpartition(".")[2] for each in paths], n=3, cutoff=0.6)
        close = [each for each in paths if each.rpartition(".")[2] in nearest]
    hint = f" Did you mean {' or '.join(close[:3])}?" if close else " See `megatron-qwen train pretrain --dry-run`."
    return f"recipe field {path}: there is no such field.{hint}"


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, default_flow_style=None, allow_unicode=True)


def load_recipe(path: Path, base: Recipe | None = None) -> Recipe:
    """Read a recipe from a .yaml, .yml or .json file; fields left out keep those of `base`.

    Raises:
        ConfigError: the file is missing, is not a mapping, or does not fit the recipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: recipe file does not exist") from error
    except RecursionError:
        raise ConfigError(f"{path}: recipe file is nested too deeply") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: recipe file cannot be read: {error}") from error
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path}: got {type(values).__name__}, expected a mapping of recipe fields")
    try:
        return recipe_from_dict(values, base)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def recipe_diff(saved: Mapping[str, Any], present: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return {field: (saved value, present value)} where two recipes (as dictionaries) differ."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name in [*saved, *(key for key in present if key not in saved)]:
        old, new = saved.get(name), present.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences |= recipe_diff(old, new, f"{prefix}{name}.")
        elif old != new:
            differences[f"{prefix}{name}"] = (old, new)
    return differences
