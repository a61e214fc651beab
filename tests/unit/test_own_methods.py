"""Own methods: allowed, typed, checked, carried along, told apart by their code."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

import rayfed_lora
from rayfed_lora import plugins
from rayfed_lora.errors import PluginError, RecipeError, RunError, RunFolderError
from rayfed_lora.plugins import rule, sampler
from rayfed_lora.plugins.modules import origin
from rayfed_lora.plugins.registry import TABLES, method_of
from rayfed_lora.plugins.tables import RULES
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.runs.claiming import kept_recipe
from rayfed_lora.storage import RunFolder
from tests.fakes import FakeFactory, make_recipe

ADAPTER_ONLY = {
    "annealing.mode": "fixed",
    "annealing.initiating.rounds": 0,
    "annealing.heating.rounds": 2,
    "annealing.heating.rank": 3,
    "annealing.cooling.rounds": 0,
    "annealing.holding.rounds": 0,
}
OWN = """
    from typing import Annotated
    import numpy as np
    from pydantic import Field
    from rayfed_lora.plugins import rule

    @rule()
    def largest(start, updates, *, share: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0):
        "The largest value of each client."
        return {name: tensor.max(axis=0) for name, tensor in updates.tensors.items()}

    def plain(start, updates):
        return start
"""


pytestmark = pytest.mark.usefixtures("forgotten_methods")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a module in the working directory."""
    name = "own_methods_of_a_test"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(OWN))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("rayfed_lora.plugins.registry._ALLOWED", set())
    yield name
    sys.modules.pop(name, None)


def base(**overrides: object) -> dict[str, object]:
    return {**ADAPTER_ONLY, **{key.replace("__", "."): v for key, v in overrides.items()}}


def test_a_recipe_does_not_import_a_module_that_the_caller_has_not_allowed(module):
    raw = {"plugins": [module], "aggregation": {"rule": "largest"}, "model": {"config": {}}}
    with pytest.raises(RecipeError, match=r"not allowed here.*--plugins"):
        load_recipe(raw)
    assert module not in sys.modules


def test_an_allowed_module_gives_its_rule_with_typed_options(module):
    settings = base(aggregation__rule="largest", aggregation__share=0.25)
    recipe = load_recipe(make_recipe(), settings, plugins=[module])
    assert recipe.plugins == [module]
    assert recipe.aggregation.options["share"] == 0.25
    # The stored recipe is read again in this process, which has allowed the module.
    assert load_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe
    for share, said in ((0.5, "less than 0.5"), ("much", "valid number")):
        with pytest.raises(RecipeError, match=f"aggregation.share: expected .*{said}"):
            load_recipe(make_recipe(), settings | {"aggregation.share": share}, plugins=[module])
    with pytest.raises(RecipeError, match=r"aggregation.shar: unknown key.*'aggregation.share'"):
        load_recipe(make_recipe(), base(aggregation__rule="largest", aggregation__shar=1))


def test_a_method_is_named_by_module_and_attribute_only_where_it_is_decorated_there(module):
    named = base(aggregation__rule=f"{module}:largest")
    with pytest.raises(RecipeError, match=r"aggregation.rule: expected 'alternate'"):
        load_recipe(make_recipe(), named)
    assert load_recipe(make_recipe(), named, plugins=[module]).aggregation.rule == (
        f"{module}:largest"
    )
    for wrong in ("plain", "np", "rule", "missing", "np.linalg"):
        with pytest.raises(RecipeError, match=r"aggregation.rule: expected"):
            load_recipe(make_recipe(), base(aggregation__rule=f"{module}:{wrong}"))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_module_of_anybody", "ModuleNotFoundError"),
        ("1 / 0", "ZeroDivisionError"),
        (
            "from rayfed_lora.plugins import rule\n@rule()\ndef own(start, updates, *, share): ...",
            "option 'share' has none",
        ),
    ],
)
def test_a_module_that_cannot_be_used_is_refused_by_name(module, tmp_path, source, said):
    (tmp_path / f"{module}.py").write_text(source)
    with pytest.raises(PluginError, match=said) as raised:
        load_recipe(make_recipe(), plugins=[module])
    assert module in str(raised.value)
    assert raised.value.exit_status == 2


def test_a_name_that_a_built_in_method_has_needs_the_module_before_it(module, tmp_path):
    source = "from rayfed_lora.plugins import rule\n@rule('median')\ndef own(start, updates): ..."
    (tmp_path / f"{module}.py").write_text(source)
    recipe = load_recipe(make_recipe(), base(aggregation__rule=f"{module}:own"), plugins=[module])
    assert RULES.method(recipe.aggregation.rule).module == module
    with pytest.raises(RecipeError, match=rf"'median' is a built-in rule.*'{module}:own'"):
        load_recipe(make_recipe(), base(aggregation__rule="median"), plugins=[module])
    # Another recipe of this process means the built-in one.
    assert RULES.method(
        load_recipe(make_recipe(), base(aggregation__rule="median")).aggregation.rule
    ).built_in


def test_something_that_is_no_method_is_refused():
    with pytest.raises(PluginError, match="expected names of modules"):
        load_recipe(make_recipe(), plugins=[lambda start, updates: start])


def test_a_rule_sees_each_update_and_is_chosen_with_its_options(tmp_path):
    seen = []

    @rule()
    def heaviest(start, updates, *, times: float = 1.0):
        """The update of the client with most examples."""
        seen.append((updates.clients.tolist(), updates.weights.tolist()))
        best = int(np.argmax(updates.weights))
        return {name: times * tensor[best] for name, tensor in updates.tensors.items()}

    recipe = load_recipe(make_recipe(clients__per_round=3), base(), plugins=[heaviest(times=2.0)])
    run = rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory())
    assert run.summary["rounds"] == 2
    # The fake client k has k + 1 examples.
    for clients, weights in seen:
        assert weights == [client + 1 for client in clients]
    assert len(seen) == 2 and all(len(clients) == 3 for clients, _ in seen)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (lambda start: {}, "expected a mapping with the tensors"),
        (lambda start: None, "got NoneType"),
        (lambda start: {n: t[..., :-1] for n, t in start.items()}, "expected floats of shape"),
        (lambda start: {n: t.astype(int) for n, t in start.items()}, "got int64"),
        (lambda start: {n: t * np.nan for n, t in start.items()}, "expected finite values"),
    ],
)
def test_what_a_rule_returns_is_checked(tmp_path, result, said):
    @rule()
    def wrong(start, updates):
        return result(start)

    recipe = load_recipe(make_recipe(), base(), plugins=[wrong()])
    with pytest.raises(RunError, match=said) as raised:
        rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory())
    assert "rule 'wrong'" in str(raised.value)


@pytest.mark.parametrize(
    ("drawn", "said"),
    [
        ([0, 0, 1], "expected 3 different clients"),
        ([0, 1], "expected 3 different clients"),
        ([0, 1, 99], "expected 3 different clients"),
        ("abc", "expected 3 different clients"),
    ],
)
def test_what_a_sampler_returns_is_checked(tmp_path, drawn, said):
    @sampler()
    def wrong_ones(pool, wanted, history, rng):
        return drawn

    recipe = load_recipe(make_recipe(clients__per_round=3), base(), plugins=[wrong_ones()])
    with pytest.raises(RunError, match=said) as raised:
        rayfed_lora.run(recipe, str(tmp_path), factory=FakeFactory())
    assert "sampler 'wrong-ones' failed in round 1" in str(raised.value)


def test_a_sampler_knows_the_losses_of_before_also_after_a_resume(tmp_path):
    known = []

    @sampler()
    def noting(pool, wanted, history, rng):
        known.append(history.losses.tolist())
        return pool[:wanted]

    settings = base(annealing__heating__rounds=3)
    recipe = load_recipe(make_recipe(clients__per_round=2), settings, plugins=[noting()])
    rayfed_lora.run(recipe, str(tmp_path / "whole"), factory=FakeFactory())
    whole, known[:] = known[:], []
    assert np.isnan(whole[0]).all()
    # Clients 0 and 1 took part in the first round, the others never.
    assert np.isfinite(whole[1][:2]).all() and np.isnan(whole[1][2:]).all()

    class StopError(Exception):
        pass

    def stop(status):
        if status.rounds_done == 2:
            raise StopError

    with pytest.raises(StopError):
        rayfed_lora.run(recipe, str(tmp_path / "cut"), factory=FakeFactory(), watch=stop)
    known.clear()
    rayfed_lora.run(recipe, str(tmp_path / "cut"), factory=FakeFactory(), resume=True)
    np.testing.assert_array_equal(known[-1], whole[-1])


def test_power_of_choice_takes_the_candidates_of_largest_loss():
    from rayfed_lora.federation.sampling import ClientHistory, power_of_choice

    history = ClientHistory(
        np.array([1, 1, 1, 1]), np.array([0.5, 2.0, np.nan, 1.0]), np.array([0, 0, -1, 0])
    )
    rng = np.random.default_rng(0)
    found = power_of_choice(np.arange(4), 2, history, rng, candidates=4)
    # Never seen before the largest loss; the rest is 1.0 and 0.5.
    assert found.tolist() == [2, 1]


def test_the_run_folder_says_where_a_method_comes_from_and_a_resume_with_other_code_is_refused(
    module, tmp_path
):
    recipe = load_recipe(make_recipe(), base(aggregation__rule="largest"), plugins=[module])
    out = tmp_path / "run"
    rayfed_lora.run(recipe, str(out), factory=FakeFactory())
    (record,) = json.loads((out / "plugins.json").read_text())
    (method,) = record["methods"]
    found = origin(RULES.method("largest"))
    assert (method["kind"], method["name"], method["module"]) == ("rule", "largest", module)
    assert (record["from_round"], method["sha256"]) == (0, found.sha256)
    source = tmp_path / f"{module}.py"
    source.write_text(source.read_text() + "\n# changed\n")
    with pytest.raises(RunFolderError, match=r"rule 'largest' of own_methods.*--accept-changed"):
        rayfed_lora.run(recipe, str(out), factory=FakeFactory(), resume=True)
    again = rayfed_lora.run(
        recipe, str(out), factory=FakeFactory(), resume=True, accept_changed_plugins=True
    )
    assert again.summary["rounds"] == 2


def test_the_median_and_the_trimmed_mean_are_those_of_numpy_and_krum_leaves_the_outlier_out():
    from rayfed_lora.aggregation.built_in.krum import krum
    from rayfed_lora.aggregation.built_in.median import median
    from rayfed_lora.aggregation.built_in.trimmed_mean import trimmed_mean
    from rayfed_lora.aggregation.updates import ClientUpdates

    values = np.float32([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [100.0, -100.0], [2.5, 6.5]])
    updates = ClientUpdates(np.arange(5), np.ones(5), {"w": values})
    np.testing.assert_allclose(median({}, updates)["w"], [2.5, 6.0])
    # One of five on each side is left out: (2 + 2.5 + 3) / 3 and (5 + 6 + 6.5) / 3.
    np.testing.assert_allclose(
        trimmed_mean({}, updates, share=0.2)["w"], [2.5, 17.5 / 3], rtol=1e-6
    )
    # Two nearest others count: client 4 has distances 0.5 twice squared, the smallest sum.
    np.testing.assert_allclose(krum({}, updates, malicious=1)["w"], [2.5, 6.5])
    with pytest.raises(RunError, match="at least 6 clients"):
        krum({}, updates, malicious=3)


def test_every_built_in_method_is_registered_as_a_plug_in_is():
    for kind, table in TABLES.items():
        for method in table.methods():
            assert method.kind == kind
            marked = method_of(getattr(sys.modules[method.module], method.target.__name__, None))
            # Optimisers of Adam's family have no name in their module.
            assert marked is None or marked.kind == kind


def test_the_options_of_a_method_that_another_one_replaces_are_left_behind():
    resolved = load_recipe(make_recipe(), {"clients.optimizer.name": "adamw"}).model_dump()
    assert resolved["clients"]["optimizer"]["beta1"] == 0.9
    sgd = load_recipe(resolved, {"clients.optimizer.name": "sgd"})
    assert "beta1" not in sgd.model_dump()["clients"]["optimizer"]
    trimmed = load_recipe(resolved, {"aggregation.rule": "trimmed-mean", "aggregation.share": 0.2})
    again = load_recipe(trimmed.model_dump(), {"aggregation.rule": "median"})
    assert "share" not in again.model_dump()["aggregation"]
    # What the user writes for the new method is checked as ever.
    with pytest.raises(RecipeError, match=r"aggregation.share: unknown key"):
        load_recipe(trimmed.model_dump(), {"aggregation": {"rule": "median", "share": 0.3}})


def registered(text: str, name: str) -> str:
    """Return the hash of a class of a notebook, whose source no file has."""
    scope = {"__name__": "__main__", "weight": plugins.weight}
    exec(textwrap.dedent(text), scope)
    found = origin(method_of(scope[name])).sha256
    TABLES["weight"].remove(method_of(scope[name]).name)
    return found


def test_other_code_of_a_notebook_has_another_hash():
    function = """
        @weight()
        def mine(report):
            return {0}
    """
    cases = [registered(function.format(value), "mine") for value in ("1.0", "2.0", "1.0")]
    assert cases[0] == cases[2] != cases[1]
    a_class = """
        @weight()
        class Mine:
            factor: float = 1.0
            def __call__(self, report):
                return {0}
    """
    cases = [registered(a_class.format(value), "Mine") for value in ("1.0", "2.0", "1.0")]
    assert cases[0] == cases[2] != cases[1]


def test_a_strangers_folder_is_read_and_exported_without_its_code(module, tmp_path, monkeypatch):
    recipe = load_recipe(make_recipe(), base(aggregation__rule="largest"), plugins=[module])
    out = tmp_path / "run"
    rayfed_lora.run(recipe, str(out), factory=FakeFactory())
    # As in another process, where nobody has allowed the module.
    monkeypatch.setattr("rayfed_lora.plugins.registry._ALLOWED", set())
    RULES.remove("largest")
    del sys.modules[module]
    (tmp_path / f"{module}.py").write_text("raise SystemExit('imported')")
    rayfed_lora.report([str(out)], str(tmp_path / "page.html"))
    assert rayfed_lora.Result.open(str(out)).rounds["round"].tolist() == [0, 1]
    kept = kept_recipe(RunFolder(out), model_only=True)
    assert (kept.name, kept.model, kept.plugins) == (recipe.name, recipe.model, [])
    with pytest.raises(RunFolderError, match="code that is not allowed here"):
        rayfed_lora.run(str(out), resume=True)
    assert module not in sys.modules


def test_an_installed_package_may_name_its_module_itself(tmp_path, monkeypatch):
    package = tmp_path / "site"
    facts = package / "fl_of_a_test-1.2.dist-info"
    facts.mkdir(parents=True)
    (package / "fl_of_a_test.py").write_text(textwrap.dedent(OWN))
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: fl-of-a-test\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text("[rayfed_lora.plugins]\nown = fl_of_a_test\n")
    (facts / "top_level.txt").write_text("fl_of_a_test\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(package)])
    monkeypatch.setattr("rayfed_lora.plugins.registry._ALLOWED", set())
    try:
        values = base(aggregation__rule="largest", plugins=["fl_of_a_test"])
        recipe = load_recipe(make_recipe(), values)
        assert recipe.aggregation.rule == "largest"
        assert origin(RULES.method("largest")).version == "1.2"
    finally:
        sys.modules.pop("fl_of_a_test", None)


def test_the_order_of_the_built_in_methods_does_not_depend_on_what_is_imported_first():
    code = "{}from rayfed_lora.recipe.loading import recipe_schema; print(recipe_schema())"
    schemas = {
        subprocess.run(
            [sys.executable, "-c", code.format(first)], capture_output=True, text=True, check=True
        ).stdout
        for first in ("", "import rayfed_lora.aggregation.built_in.zero_pad; ")
    }
    assert len(schemas) == 1
