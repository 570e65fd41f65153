"""Gives a function the fields of a Config as its parameters: one model fills file, command line and web form."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, TypeVar

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


def _parameter(name: str, field: FieldInfo, optional: bool) -> inspect.Parameter:
    annotation: Any = field.annotation
    for constraint in field.metadata:
        annotation = Annotated[annotation, constraint]
    default: Any = inspect.Parameter.empty
    if not field.is_required():
        default = field.get_default(call_default_factory=True)
    elif optional:
        annotation, default = annotation | None, None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
