"""Web forms: a function gets the fields of a Config as parameters, and its answer becomes a table and back.

So one model fills configuration file, command line and form.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field
from pydantic.fields import FieldInfo

from starflow.config import Config

T = TypeVar("T")
C = TypeVar("C", bound=Config)


def parameters_of(
    *models: type[Config], optional: Collection[str] = (), hidden: Collection[str] = ()
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorator: `function(**parameters)` gets the fields of `models`, in order and flat, as keyword-only parameters.

    Types, bounds, defaults and descriptions are the models'. Fields in `optional` are None when left out, whatever
    the model says: something else fills them, such as a preset. Fields in `hidden` are no parameters. The function
    itself is called with those that differ from the form's defaults only; `fields_of` gives each model its own.
    """
    fields = {name: field for model in models for name, field in model.model_fields.items() if name not in hidden}
    parameters = [_parameter(name, field, name in optional) for name, field in fields.items()]
    defaults = {parameter.name: parameter.default for parameter in parameters}

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(**given: Any) -> T:
            return function(**{name: value for name, value in given.items() if value != defaults[name]})

        annotations = {parameter.name: parameter.annotation for parameter in parameters}
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = annotations
        lines = [f"    {name}: {field.description}" for name, field in fields.items() if field.description]
        call.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Args:", *lines])
        return call

    return decorate


def fields_of(model: type[C], parameters: Mapping[str, Any], **more: Any) -> C:
    """A `model` of those parameters that are its fields, and `more`. Raises pydantic's ValidationError."""
    return model.model_validate({name: v for name, v in parameters.items() if name in model.model_fields} | more)


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
    if optional:
        annotation, default = annotation | None, None
    elif not field.is_required():
        default = field.get_default(call_default_factory=True)
    # Prefect sets its own title, the parameter's name; only the schema's extras survive that.
    annotation = Annotated[annotation, Field(json_schema_extra={"title": title})]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
