"""The shipped JSON Schema is the recipe's own."""

import json
from importlib import resources

from rayfed_lora.recipe.loading import recipe_schema


def test_the_shipped_schema_is_what_the_recipe_says():
    shipped = resources.files("rayfed_lora") / "recipe" / "shipped" / "recipe.schema.json"
    assert json.loads(shipped.read_text("utf-8")) == json.loads(json.dumps(recipe_schema()))
