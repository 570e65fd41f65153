"""A configuration model becomes a function's parameters, and an answer becomes a table and back."""

from __future__ import annotations

import inspect
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from starflow.config import Config
from starflow.forms import answer_from_rows, answer_rows, parameters_of


class Recipe(Config):
    flour: int = Field(ge=1, description="Grams.")
    oven: int = Field(180, title="Oven temperature", description="Degrees.")
    nuts: tuple[str, ...] = ()
    notes: str | None = None
    secret: str = "salt"


@parameters_of(Recipe, optional=("flour", "nuts"), hidden=("secret",))
def bake(**parameters: Any) -> dict[str, Any]:
    """Bakes."""
    return parameters


def test_parameters_carry_defaults_and_order() -> None:
    parameters = inspect.signature(bake).parameters
    assert list(parameters) == ["flour", "oven", "nuts", "notes"]
    assert [p.default for p in parameters.values()] == [None, 180, None, None]


def test_docstring_explains_each_parameter() -> None:
    assert bake.__doc__ == "Bakes.\n\nArgs:\n    flour: Grams.\n    oven: Degrees."


def test_only_what_differs_from_the_form_is_given() -> None:
    assert bake(flour=None, oven=180, nuts=(), notes="hot") == {"nuts": (), "notes": "hot"}


names = st.text(st.characters(categories=["Ll", "Nd"], include_characters="-_"), min_size=1)
values = st.none() | st.integers() | st.text()


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(names, values | st.dictionaries(names, values)))
def test_answers_survive_the_table(answer: dict[str, Any]) -> None:
    assert answer_from_rows(answer_rows(answer)) == answer
