"""Whatever a recipe's file holds: a recipe, or an error of our own that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayfed_lora.errors import BadInputError, RecipeError
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml, shipped_names, shipped_text
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.tuning.space import load_space
from tests.fakes import RECIPE

QUICK = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
# What stands before a colon in the shipped recipes.
KEYS = sorted(
    {
        line.partition(":")[0].strip("# ")
        for name in shipped_names()
        for line in shipped_text(name).splitlines()
    }
)
ODD = st.sampled_from(
    [
        float("nan"),
        float("inf"),
        -0.0,
        2**63,
        -(10**400),
        "",
        "\0",
        "\ud800",
        "a" * 5000,
        "\x85",
        " a\u2028",
        "*x",
        "!!python/name:os.system",
        b"bytes",
        None,
        ...,
    ]
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=8), ODD),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(KEYS), st.text(max_size=4), st.integers()), inner, max_size=4
        ),
    ),
    max_leaves=12,
)


def loaded(source: Any, overrides: Any = ()) -> Recipe | None:
    """Return the recipe, None where it is refused; it comes back from its own YAML."""
    try:
        recipe = load_recipe(source, overrides)
    except RecipeError as error:
        assert 0 < len(str(error)) < 100_000
        return None
    assert load_recipe(parse_yaml("again", recipe_yaml(recipe))) == recipe
    return recipe


@QUICK
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_a_file_of_any_bytes_is_a_recipe_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    loaded(path)
    with pytest.raises(BadInputError):
        load_space(path)


@QUICK
@given(
    text=st.text(
        st.sampled_from("abc: -[]{}&*!|>'\"#%@`,?~<=.0123456789\n\t\r\\é\u2028"), max_size=60
    )
)
def test_yaml_of_any_signs_is_a_document_or_refused(text: str) -> None:
    try:
        parse_yaml("signs", text)
    except RecipeError as error:
        assert len(str(error)) < 2000


@QUICK
@given(data=st.data(), name=st.sampled_from(shipped_names()))
def test_a_shipped_recipe_with_any_change_is_a_recipe_or_refused(
    tmp_path: Path, data: st.DataObject, name: str
) -> None:
    text = shipped_text(name)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(start + 20, len(text))))
        text = text[:start] + data.draw(st.text(max_size=6)) + text[end:]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8", errors="replace")
    loaded(path)


@settings(QUICK, max_examples=25)
@given(VALUES)
def test_any_value_under_any_key_is_a_recipe_or_refused(value: Any) -> None:
    if isinstance(value, dict):
        loaded(value)
        loaded({**RECIPE, **value})
    for key in ("seed", "data", "model.config.x", "clients.ranks", "storage.path", "no.such.key"):
        loaded(RECIPE, {key: value})


@QUICK
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_setting_is_taken_or_refused(key: str, value: str) -> None:
    loaded(RECIPE, [f"{key}={value}"])
    loaded(RECIPE, [f"model.config.x={value}"])


def bomb(levels: int) -> str:
    """Return YAML that stands for 9 ** levels values."""
    lines = ["x0: &x0 [a, a, a, a, a, a, a, a, a]"]
    lines += [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


BASE = "name: a\nmodel: {config: {architecture: vit}}\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (
            f"{bomb(9)}\nmodel: {{config: {{architecture: vit, x: *x8}}}}\n",
            "at most 100,000 values",
        ),
        (f"{BASE}data: &d {{partition: *d}}\n", "at most 32 levels"),
        (f"{BASE}clients: {'{a: ' * 60}1{'}' * 60}\n", "at most 32 levels"),
        (f"{BASE}clients: {'[' * 400}{']' * 400}\n", "recursion|at most 32 levels"),
        (f"{BASE}seed: {'9' * 5000}\n", "4300 digits"),
        (f"{BASE}seed: {2**63}\n", "at most 64 bits"),
        (f"{BASE}seed: .nan\n", "seed: expected a valid integer"),
        (f"{BASE}# {'x' * 2_000_000}\n", "at most 1,048,576 characters"),
        ("model: {config: {architecture: vit, x: .nan}}", "finite numbers.*got nan"),
        ("model: {config: {architecture: vit, x: 2020-01-01}}", "got a date"),
        ('model: {config: {architecture: vit, x: "\\ud800"}}', "got '.ud800'"),
        ("model: !!python/object/apply:os.system ['false']", "could not determine a constructor"),
        (json.dumps({f"k{i}": i for i in range(2000)}), "unknown key"),
    ],
)
def test_documents_made_to_harm_are_refused_in_a_line(
    tmp_path: Path, text: str, complaint: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(path)


@pytest.mark.parametrize("source", ["a\0.yaml", "x" * 5000, "", ".", "\ud800", "a\0b"])
def test_a_name_that_no_file_can_have_is_refused(source: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(source)
