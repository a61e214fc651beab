"""The public names and their signatures: a change here is a change for every user.

`*` marks a keyword-only parameter, `=` one with a default. Names may be added; a name, a parameter
or its place that goes away, and a new parameter without a default, need a new major version.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import rayfed_lora
from rayfed_lora import plugins

PACKAGE = {
    "Comparison": "runs methods rounds target",
    "Jobs": "address= client=",
    "Recipe": "*version= *name= *seed= *plugins= *method= *data= *model *adapter= *annealing="
    " *aggregation= *clients= *network= *wire= *privacy= *evaluation= *runtime= *storage="
    " *tracking=",
    "Result": "location summary",
    "SearchResult": "location trials best",
    "compare": "recipe methods out seeds= *settings= *target= *address= *watch= *plugins="
    " *data= *factory=",
    "doctor": "address= recipes= *storage= *probe=",
    "load_recipe": "source overrides= variant= *endpoints= *plugins=",
    "plan": "recipe *plugins= *data=",
    "report": "locations to=",
    "run": "recipe out= *resume= *address= *watch= *plugins= *accept_changed_plugins= *callbacks="
    " *data= *factory=",
    "tune": "space recipe out= *samples= *scheduler= *search= *objectives= *max_concurrent="
    " *resume= *settings= *address= *watch= *plugins= *data= *factory=",
}
PLUGINS = {
    "ClientHistory": "examples losses rounds",
    "ClientUpdates": "clients weights tensors",
    "Done": "client round start end memory shared steps lr examples",
    "FinishedRound": "record clients bill model",
    "LocalStep": "parameters gradients received memory shared rates step",
    "ModelStep": "start mean shared arrived clients round",
    "Offer": "round stage rank proposed ladder energy_current= energy_proposed= draw= temperature="
    " metric= target= tolerance= higher_is_better=",
    "acceptance": "name= *needs=",
    "allocation": "name= *needs_spectra=",
    "data": "name= *task=",
    "joined": "parts",
    "metric": "name= *higher_is_better=",
    "model": "name= *task=",
    "objective": "name= *memory= *message= *shared= *plain_sgd= *summary= *source=",
    "optimizer": "name=",
    "partition": "name=",
    "rule": "name= *needs= *kept= *summary= *source= *optimizers= **facts",
    "sampler": "name=",
    "shape": "name=",
    "update": "name= *summary= *source= *size= **facts",
    "weight": "name=",
}
METHODS = {
    "Recipe.load": "source *plugins=",
    "Recipe.with_": "self changes *plugins=",
    "Result.adapter": "self",
    "Result.model": "self",
    "Result.open": "location",
    "Result.plot": "self",
}


def parameters(thing: Any) -> str:
    """Return the parameters of a callable in the form of the tables above."""
    marks = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return " ".join(
        marks.get(each.kind, "") + each.name + "=" * (each.default is not each.empty)
        for each in inspect.signature(thing).parameters.values()
    )


@pytest.mark.parametrize(("module", "names"), [(rayfed_lora, PACKAGE), (plugins, PLUGINS)])
def test_the_public_names_and_their_parameters_are_these(module, names):
    public = {name for name in module.__all__ if name != "__version__"}
    assert public == set(names)
    assert {name: parameters(getattr(module, name)) for name in names} == names


def test_the_methods_of_recipes_and_results_are_these():
    found = {}
    for path in METHODS:
        kind, _, name = path.partition(".")
        found[path] = parameters(getattr(getattr(rayfed_lora, kind), name))
    assert found == METHODS
    for name in ("rounds", "clients", "notes", "harness"):
        assert isinstance(vars(rayfed_lora.Result)[name], property)


def test_another_name_of_a_module_is_an_attribute_error():
    for module in (rayfed_lora, plugins):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = module.nothing


def test_no_public_function_has_the_name_of_a_package():
    # The import of a package would put it in the function's place.
    folders = {path.parent.name for path in Path(rayfed_lora.__file__).parent.glob("*/__init__.py")}
    public = {name for name in rayfed_lora.__all__ if name != "plugins"}
    assert not folders & public
