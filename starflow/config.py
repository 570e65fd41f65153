"""Configuration: frozen pydantic models, filled from a YAML file and ``key=value`` overrides."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from starflow.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML whose booleans are true and false alone (YAML 1.2): ``no`` is a language, ``off`` a word.

    A field of type bool takes these words all the same.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))


class Config(BaseModel):
    """Base of every configuration model and manifest: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


C = TypeVar("C", bound=Config)


def load_config(model: type[C], file: Path | None = None, overrides: Sequence[str] = (), /, **values: Any) -> C:
    """Builds `model` from `file`, then `values` that are not None, then `overrides`; later ones win.

    `overrides` are ``key=value`` strings; a dot in the key reaches into a nested model and the value is
    read as YAML (``steps=100``, ``betas=[0.9,0.95]``).

    Raises ConfigError naming the file, the key, its value and the closest valid key.
    """
    data: dict[str, Any] = {}
    if file is not None:
        data = read_yaml(file)
    data.update({key: value for key, value in values.items() if value is not None})
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example steps=100")
        try:
            _assign(data, key.split("."), _parse(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from error
    try:
        return model.model_validate(data)
    except ValidationError as error:
        where = f" in {file}" if file is not None else ""
        raise ConfigError(f"configuration{where}: " + "; ".join(_explain(model, error))) from error


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file. Raises ConfigError when it is missing or holds something else."""
    try:
        data = _parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"configuration file {file} does not exist; check the path") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"configuration file {file} cannot be read as YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"configuration file {file} holds a {type(data).__name__}; write `key: value` lines")
    return data


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)


def _assign(data: dict[str, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        data = data.setdefault(key, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {'.'.join(path)}: {key} is not a group of settings")
    data[path[-1]] = value


def _explain(model: type[BaseModel], error: ValidationError) -> list[str]:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(item["loc"][-1]), list(model.model_fields), n=1)
            hint = (
                f", did you mean {close[0]}?" if close else f"; known keys: {', '.join(model.model_fields) or 'none'}"
            )
            lines.append(f"unknown key {name}{hint}")
        elif item["type"] == "missing":
            lines.append(f"{name} is missing; set it in the file or as {name}=VALUE")
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "tuple_type":
                message = f"a list is needed; write {name}=[{item['input']}]"
            lines.append(f"{name} = {item['input']!r}: {message}" if name else message)
    return lines
