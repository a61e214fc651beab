"""The shipped JSON Schema is the recipe's own."""

import json
from importlib import resources

import jsonschema
import pytest
from ruamel.yaml import YAML

from rayfed_lora.recipe.loading import recipe_schema


def test_the_shipped_schema_is_what_the_recipe_says():
    shipped = resources.files("rayfed_lora") / "recipe" / "shipped" / "recipe.schema.json"
    assert json.loads(shipped.read_text("utf-8")) == json.loads(json.dumps(recipe_schema()))


@pytest.mark.parametrize(
    "text",
    [
        "data: {format: chat}",
        "wire: {up: int8, down: float16}",
        "clients: {sampler: power-of-choice, weight: uniform, objective: scaffold}",
        "clients: {attack: sign-flip}",
        "clients: {availability: 0.1}",
        "clients: {availability: times.csv}",
        "clients: {speed: 4, local_steps: 3, batch_size: 8}",
        "clients: {optimizer: {lr: {distribution: uniform, low: 0.1, high: 0.2}}}",
        "clients: {local_steps: {choices: [1, 2]}, batch_size: {column: size}}",
        "clients: {ranks: 4}",
        "clients: {ranks: [4, 8]}",
        "network: {up_mbps: 3}",
        "annealing: {acceptance: metropolis, allocation: spectral}",
        "evaluation: {keep_best: true, generate: {examples: all}, harness: [hellaswag]}",
        "evaluation: {keep_best: accuracy, harness: {tasks: [hellaswag], few_shot: 10}}",
        "data: {source: [a.csv, b.csv]}",
    ],
)
def test_short_forms_fit_the_schema(text: str) -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    validator.validate(YAML(typ="safe", pure=True).load(f"model: {{}}\n{text}"))


@pytest.mark.parametrize("text", ["data: {format: 3}", "clients: {attack: 3}", "wire: {up: 8}"])
def test_other_types_do_not(text: str) -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(YAML(typ="safe", pure=True).load(f"model: {{}}\n{text}"))
