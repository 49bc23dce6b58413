"""From YAML and `--set section.key=value` to a checked Config, with errors that name the place.

Promises
- The error names the path in the YAML, what was found, and what would be valid.
- YAML is parsed with the safe loader; overrides are YAML values too (`--set learner.max_steps=4`).
- A recipe may extend another (`extends: quickstart`) and say only what differs.
- Relative paths that exist in the working directory win; else they are sought beside the packages, so that
  `quickstart/model` is found wherever the program is started.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from services.config import OBJECTIVES, Config, Sections
from services.config.evaluation import evaluation_sections

SectionsT = TypeVar("SectionsT", bound=Sections)
EXTENDS = "extends"
"""Top-level key of a recipe that names the recipe it is laid over."""
PROJECT_ROOT = Path(__file__).resolve().parent.parent


class ConfigError(ValueError):
    """The configuration cannot be used; the text says where, what was found and what would be valid."""


def find(path: str | Path) -> Path:
    """A path as given if it exists, else below the project root if it exists there, else as given."""
    given = Path(path)
    if given.is_absolute() or given.exists():
        return given
    beside = PROJECT_ROOT / given
    return beside if beside.exists() else given


def recipe_path(name: str) -> Path:
    """A YAML file by path, or a shipped recipe by its bare name (`quickstart`).

    Raises:
        ConfigError: there is neither; the text lists the shipped recipes.
    """
    for candidate in (Path(name), PROJECT_ROOT / name, PROJECT_ROOT / "recipes" / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    shipped = sorted(p.stem for p in (PROJECT_ROOT / "recipes").glob("*.yaml"))
    raise ConfigError(f"no recipe {name!r}: give a YAML file, or one of {', '.join(shipped)}")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Parse a recipe and apply overrides.

    Args:
        path: YAML file, or the bare name of a shipped recipe.
        overrides: `section.key=value` each; the value is YAML; list items by index (`rewards.0.weight=2`).

    Raises:
        ConfigError: anything that makes the result unusable.
    """
    raw, source = _overridden(path, overrides)
    config = parse_config(raw, source=source)
    _check_scorers(config, source)
    return config


def load_for_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The same for an evaluation: what only a training run reads must be right in itself, and no more.

    In what is returned it goes with the rest (services/config/evaluation.py).

    Raises:
        ConfigError: anything that makes the result unusable for an evaluation.
    """
    raw, source = _overridden(path, overrides)
    config = parse_config(evaluation_sections(_parsed(Sections, raw, source)), source=source)
    _check_scorers(config, source)
    return config


def parse_config(raw: dict[str, Any], *, source: str) -> Config:
    """Validate a nested dict; `source` is named in the error."""
    return _parsed(Config, raw, source)


def _parsed(kind: type[SectionsT], raw: dict[str, Any], source: str) -> SectionsT:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(raw, detail) for detail in error.errors()]
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _check_scorers(config: Config, source: str) -> None:
    from reward_servers.scorers import is_scorer, scorer_names

    valid = scorer_names()
    for index, reward in enumerate(config.rewards):
        if reward.app is not None and not is_scorer(reward.app):
            close = difflib.get_close_matches(reward.app, valid, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"{source}:\n  rewards.{index}.app: there is no scorer {reward.app!r}; {hint}"
                f"valid: {', '.join(valid)}, or package.module:create"
            )


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; loads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _overridden(path: str | Path, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """A recipe's sections, and what errors call it."""
    file = recipe_path(str(path))
    raw = _read(file, ())
    for override in overrides:
        _apply(raw, override)
    return raw, str(file)


def _read(file: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's sections, laid over those of the recipe it extends."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: expected a mapping of sections, found {type(raw).__name__}")
    if EXTENDS not in raw:
        return raw
    base = raw.pop(EXTENDS)
    if not isinstance(base, str):
        raise ConfigError(f"{file}: {EXTENDS}: expected the name of a recipe or a YAML file, found {base!r}")
    beside = file.parent / base
    found = (beside if beside.is_file() else recipe_path(base)).resolve()
    if found in extending or found == file.resolve():
        raise ConfigError(f"{file}: {EXTENDS}: {base} is extended by itself")
    return _overlaid(_read(found, (*extending, file.resolve())), raw)


def _overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; sections are merged key by key, lists replaced, and so is an objective of another name."""
    result = dict(base)
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and _mergeable(key, old, value):
            result[key] = _overlaid(old, value)
        else:
            result[key] = value
    return result


def _mergeable(key: str, base: dict[str, Any], over: dict[str, Any]) -> bool:
    # An objective that does not name itself is the one it is laid over.
    was = base.get("name", "dgpo")
    return key != "objective" or over.get("name", was) == was


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override!r}: expected section.key=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    node: Any = raw
    for depth, part in enumerate(parts[:-1]):
        node = _child(node, part, ".".join(parts[: depth + 1]), override)
    if isinstance(node, list):
        index = _index(node, parts[-1], override)
        node[index] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parts[:-1])} holds a value, not a section")


def _child(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {override!r}: {path} is inside a value, not a section")
    if node.get(part) is None:
        node[part] = {}
    return node[part]


def _index(node: list[Any], part: str, override: str) -> int:
    if not (part.isascii() and part.isdigit()) or int(part) >= len(node):
        raise ConfigError(
            f"--set {override!r}: {part!r} is not an index of a list of {len(node)}: "
            f"valid are 0 to {len(node) - 1}"
        )
    return int(part)


def _explain(raw: dict[str, Any], detail: Any) -> str:
    # Behind `objective` comes the tag that told its models apart, which is no key of the YAML.
    location = detail["loc"]
    keys = location if location[:1] != ("objective",) else ("objective", *location[2:])
    place = ".".join(str(part) for part in keys) or "(whole file)"
    if detail["type"] == "union_tag_invalid":
        return f"{place}.name: {detail['ctx']['tag']!r} is none of {detail['ctx']['expected_tags']}"
    if detail["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        valid = sorted(section.model_fields) if section else []
        close = difflib.get_close_matches(str(detail["loc"][-1]), valid, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"{place}: unknown key; {hint}valid keys: {', '.join(valid)}"
    if detail["type"] == "missing":
        return f"{place}: missing, and it has no default"
    if detail["type"] == "too_short":
        return f"{place}: needs at least {detail['ctx']['min_length']} of them, found none"
    found = detail.get("input")
    if detail["type"] == "literal_error":
        return f"{place}: {found!r} is none of {detail['ctx']['expected']}{_nearest(found, detail['ctx'])}"
    shown = f" (found {found!r})" if not isinstance(found, dict | list) else ""
    return f"{place}: {detail['msg'].removeprefix('Value error, ')}{shown}"


def _nearest(found: Any, context: dict[str, Any]) -> str:
    valid = re.findall(r"'([^']*)'", context["expected"])
    close = difflib.get_close_matches(str(found), valid, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    section: Any = Config
    parts = iter(location)
    for part in parts:
        if isinstance(part, int):
            continue
        if part in OBJECTIVES:
            section = OBJECTIVES[part]
            continue
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return None
        field = section.model_fields.get(part)
        if field is None:
            return None
        annotation = field.annotation
        if get_origin(annotation) is dict:
            section = get_args(annotation)[1]
            next(parts, None)  # its key
            continue
        arguments = [a for a in getattr(annotation, "__args__", ()) if a is not Ellipsis]
        section = arguments[0] if arguments else annotation
    return section if isinstance(section, type) and issubclass(section, BaseModel) else None
