"""Web forms: a function gets the fields of a Config as parameters, and its answer becomes a table and back.

So one model fills configuration file, command line and form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field
from pydantic.fields import FieldInfo

from starflow.config import Config

F = TypeVar("F", bound=Callable[..., Any])


def parameters_of(
    model: type[Config], *, optional: Collection[str] = (), hidden: Collection[str] = ()
) -> Callable[[F], F]:
    """Decorator: `function(**parameters)` gets the fields of `model`, flat, as keyword-only parameters.

    Types, bounds, defaults and descriptions are the model's. Fields in `optional` may be left out although the
    model requires them (something else fills them, such as a preset) and then are absent from `parameters`, as
    is every parameter that is None by default. Fields in `hidden` are no parameters.
    """
    fields = {name: field for name, field in model.model_fields.items() if name not in hidden}

    def decorate(function: F) -> F:
        parameters = [_parameter(name, field, name in optional) for name, field in fields.items()]
        signature = inspect.Signature(parameters, return_annotation=dict[str, Any])
        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        summary = inspect.cleandoc(function.__doc__ or "")
        lines = [f"    {name}: {field.description}" for name, field in fields.items() if field.description]
        function.__doc__ = "\n".join([summary, "", "Args:", *lines])
        return function

    return decorate


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters` without those left empty."""
    return {name: value for name, value in parameters.items() if value is not None}


def answer_rows(answer: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """A nested answer as rows of a table that people can read: ``{"what": "dropped.404", "value": 12}``."""
    rows: list[dict[str, Any]] = []
    for key, value in answer.items():
        if isinstance(value, Mapping):
            rows += answer_rows(value, f"{prefix}{key}.") or [{"what": f"{prefix}{key}.", "value": 0}]
        else:
            rows.append({"what": f"{prefix}{key}", "value": value})
    return rows


def answer_from_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `answer_rows`, for answers of at most two levels."""
    answer: dict[str, Any] = {}
    for row in rows:
        group, dot, leaf = str(row["what"]).partition(".")
        if not dot:
            answer[group] = row["value"]
            continue
        members = answer.setdefault(group, {})
        if leaf:
            members[leaf] = row["value"]
    return answer


def _parameter(name: str, field: FieldInfo, optional: bool) -> inspect.Parameter:
    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    title = field.title or name.replace("_", " ").capitalize()
    default: Any = inspect.Parameter.empty
    if not field.is_required():
        default = field.get_default(call_default_factory=True)
    elif optional:
        annotation, default = annotation | None, None
    # Prefect sets its own title, the parameter's name; only the schema's extras survive that.
    annotation = Annotated[annotation, Field(json_schema_extra={"title": title})]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
