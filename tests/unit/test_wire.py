"""Codecs and attacks in whole runs of the fake trainer: bytes, bits, resume."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import rayfed_lora
from rayfed_lora.errors import ClientError, RecipeError
from rayfed_lora.federation.run import fresh
from rayfed_lora.federation.server import Server
from rayfed_lora.launching.planning import plan
from rayfed_lora.recipe.loading import load_recipe, recipe_yaml
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml
from rayfed_lora.training.preparing import prepare
from rayfed_lora.types import AdapterState
from rayfed_lora.wire.upload import Lost, Named, Upload, malicious_clients, uploaded
from tests.fakes import Behaviour, FakeFactory, initial, local_engine, make_recipe
from tests.unit.test_methods import Silent

FIXED: dict[str, Any] = {
    "mode": "fixed",
    "initiating": {"rounds": 0},
    "heating": {"rounds": 2, "rank": 3},
    "cooling": {"rounds": 0},
    "holding": {"rounds": 0},
}


def fixed(**overrides: Any) -> Recipe:
    """Return a run of two adapter rounds of rank 3 in which all six clients take part."""
    return make_recipe(annealing=FIXED, clients__per_round=6, **overrides)


def models(recipe: Recipe) -> list[Any]:
    engine = local_engine(recipe)
    population = engine.open()
    server = Server(recipe, engine, population, Silent(), lambda: False)
    return [run.model.state for run in server.rounds(fresh(recipe, engine, population))]


def run(recipe: Recipe, folder: Any, **options: Any) -> Any:
    return rayfed_lora.run(recipe, str(folder), factory=FakeFactory(), **options)


def test_a_recipe_keeps_its_codecs_and_a_text_stands_for_a_name():
    recipe = make_recipe(
        wire={"up": {"name": "top-k", "share": 0.5}, "down": "int8"}, clients__attack="sign-flip"
    )
    assert recipe.wire.up.named.options == {"share": 0.5}
    assert (recipe.wire.down.name, recipe.clients.attack.share) == ("int8", 0.2)
    assert load_recipe(parse_yaml("again", recipe_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"wire__up": "sign-flip"}, "wire.up.name: expected 'float32'"),
        ({"clients__attack": "int8"}, "clients.attack.name: expected 'sign-flip'"),
        ({"wire__down": "top-k"}, "encodes a change, the download is the state"),
        ({"wire__down": "int8", "aggregation__rule": "stacking"}, "sends the result of a round"),
        ({"wire__down": "int8", "aggregation__rule": "alternate"}, "sends the result of a round"),
        ({"wire__down": "int8", "annealing__cooling__residual": "fold"}, "must be exact"),
        ({"wire__up": {"name": "int8", "share": 1.0}}, "unknown key; known here: name"),
    ],
)
def test_settings_that_do_not_go_together_are_faults(settings, reason):
    with pytest.raises(RecipeError, match=reason):
        make_recipe(**settings)


@pytest.mark.parametrize(
    "rule", ["stacking", "residual", "alternate", "share-a", "freeze-a", "zero-pad", "krum"]
)
def test_uploads_of_every_rule_can_be_encoded(rule):
    assert make_recipe(
        annealing={**FIXED}, wire__up="int8", aggregation__rule=rule
    ).aggregation.rule == (rule)


def test_bytes_of_an_int8_run_are_as_counted_by_hand(tmp_path):
    result = run(fixed(wire__up="int8", wire__down="float16"), tmp_path / "a")
    # Rank 3: A of q 3 x 4, B 6 x 3, A of v 3 x 3, B 4 x 3, head 2 x 3: 12 + 18 + 9 + 12 + 6 = 57
    # values; rows with a scale: 3 of each factor, 2 of the head.
    up, down = 57 + 4 * (4 * 3 + 2), 2 * 57
    rounds, clients = result.rounds, result.clients
    assert rounds["params_up"].tolist() == rounds["params_down"].tolist() == [6 * 57] * 2
    assert rounds["bytes_up"].tolist() == [6 * up] * 2
    assert rounds["bytes_down"].tolist() == [6 * down] * 2
    assert set(clients["bytes_up"]) == {up} and set(clients["bytes_down"]) == {down}
    found = result.summary["communication"]
    # FedAvg: 47 values in 5, 24, 12 and 6; int8: rows 1 of embed, 4 of q (6 x 4 across), 3 of v
    # (4 x 3 across) and 2 of the head, a scale each.
    fedavg_up, fedavg_down = 47 + 4 * (1 + 4 + 3 + 2), 2 * 47
    assert found["fedavg_total_bytes"] == 2 * 6 * 2 * 47 * 4
    assert found["fedavg_total_bytes_same_codec"] == 2 * 6 * (fedavg_up + fedavg_down)
    assert found["reduction_vs_fedavg"] == 1 - (up + down) / (2 * 47 * 4)
    assert found["reduction_vs_fedavg_same_codec"] == pytest.approx(
        1 - (up + down) / (fedavg_up + fedavg_down)
    )


def test_the_simulated_clock_takes_the_bytes_as_sent():
    slow = {"network": {"up_mbps": 8e-6 * 100}}  # 100 bytes a second

    def seconds(**wire: Any) -> float:
        recipe = fixed(**slow, **wire)
        engine = local_engine(recipe)
        population = engine.open()
        server = Server(recipe, engine, population, Silent(), lambda: False)
        return next(server.rounds(fresh(recipe, engine, population))).clock_s

    assert seconds() == pytest.approx(57 * 4 / 100)
    assert seconds(wire__up="float16") == pytest.approx(57 * 2 / 100)


def test_clients_limited_to_lower_ranks_send_fewer_bytes(tmp_path):
    recipe = fixed(wire__up="int8", aggregation__rule="zero-pad", clients__ranks=[1, 3])
    sent = run(recipe, tmp_path / "a").clients.groupby("client")["bytes_up"].first()
    # Rank 1: 4 + 6 + 3 + 4 + 6 values, and 4 + 2 rows.
    assert sent.tolist() == [23 + 24, 57 + 56] * 3


def test_the_server_keeps_its_own_state_and_clients_train_from_the_decoded_one():
    plain, coarse = models(fixed()), models(fixed(wire__down="int8"))
    # The fake adds the same number to each value wherever it starts: the server's state, to which
    # changes are added, does not see the rounding of the download.
    for one, other in zip(plain, coarse, strict=True):
        np.testing.assert_allclose(one.dense["head"], other.dense["head"], rtol=1e-5)
        np.testing.assert_allclose(one.factors["q"].b, other.factors["q"].b, rtol=1e-5)


def test_sign_flipping_clients_pull_the_mean_the_other_way():
    recipe = fixed(clients__attack={"name": "sign-flip", "share": 0.5})
    bad = set(malicious_clients(recipe.seed, 0.5, 6).tolist())
    assert len(bad) == 3
    # Client k of weight k + 1 adds k in the first round, a malicious one -k.
    move = sum((k + 1) * (-k if k in bad else k) for k in range(6)) / 21
    np.testing.assert_allclose(
        models(recipe)[0].dense["head"], initial("head") + move, rtol=1e-5, atol=1e-5
    )


def test_clients_parquet_says_which_clients_are_malicious(tmp_path):
    recipe = fixed(clients__attack={"name": "scaling", "share": 0.34})
    rows = run(recipe, tmp_path / "a").clients
    bad = malicious_clients(recipe.seed, 0.34, 6).tolist()
    assert len(bad) == 2
    assert rows.loc[rows["malicious"], "client"].unique().tolist() == bad
    assert "malicious" not in run(fixed(), tmp_path / "b").clients


WIRED: dict[str, Any] = {
    "wire": {"up": "int8", "down": "int8"},
    "clients__attack": {"name": "noise", "share": 0.34, "std": 0.1},
}


@pytest.mark.parametrize("rule", ["factor-average", "product-svd", "share-a"])
def test_threads_and_a_resume_give_the_same_bits(rule, tmp_path):
    mode = "fixed" if rule == "share-a" else "staged"
    settings = {**WIRED, "aggregation__rule": rule, "annealing__mode": mode}
    recipe = make_recipe(**settings)
    whole = run(recipe, tmp_path / "whole").summary["adapter_sha256"]
    threads = make_recipe(**settings, runtime__client_actors=2)
    assert run(threads, tmp_path / "threads").summary["adapter_sha256"] == whole
    broken = FakeFactory(Behaviour(raising=frozenset((client, 3) for client in range(6))))
    with pytest.raises(ClientError):
        rayfed_lora.run(recipe, str(tmp_path / "parts"), factory=broken)
    resumed = run(recipe, tmp_path / "parts", resume=True)
    assert resumed.summary["adapter_sha256"] == whole
    assert len(resumed.rounds) == 6


def test_a_plan_has_the_bytes_of_the_run(tmp_path):
    recipe = load_recipe(
        "digits-vit", {"wire": {"up": "int8", "down": "bfloat16"}, "data.partition.clients": 12}
    )
    planned = plan(recipe)
    sent = planned.totals.communication()
    assert sent["fedavg_total_bytes_same_codec"] < sent["fedavg_total_bytes"] / 2
    first = planned.rounds[0]
    # A full round: every value in one byte and its scales, and in two bytes.
    values = planned.outline.shape.total_params * first.clients
    assert values < first.bytes_up < 1.5 * values and first.bytes_down == 2 * values
    assert json.dumps(sent)


def test_malicious_clients_train_with_mirrored_labels_and_others_do_not():
    settings = {
        "data.partition.clients": 6,
        "data.partition.kind": "iid",
        "clients.per_round": 6,
    }
    attack = {"clients.attack": {"name": "label-flip", "share": 0.34}}
    plain = prepare(load_recipe("digits-vit", settings))
    attacked = prepare(load_recipe("digits-vit", {**settings, **attack}))
    bad = malicious_clients(0, 0.34, 6).tolist()
    assert len(bad) == 2
    for client in range(6):
        rows = plain.clients.examples(client)
        own = plain.train.labels[rows]
        expected = 9 - own if client in bad else own
        np.testing.assert_array_equal(attacked.train.labels[rows], expected)
    np.testing.assert_array_equal(plain.test.labels, attacked.test.labels)
    assert plain.fingerprint != attacked.fingerprint


def test_what_a_codec_has_lost_is_sent_with_the_next_update():
    upload = Upload(0, codec=Named("top-k", {"share": 0.25}), error_feedback=True)
    received = AdapterState({}, {"w": np.zeros(4, np.float32)})
    # Client 3 sends one of four values a round: of (1, 4, 2, 3) the 4, then of (2, 4, 4, 6) the 6.
    lost = Lost({})
    for wanted, seen, left in (
        ([1, 4, 2, 3], [0, 4, 0, 0], [1, 0, 2, 3]),
        ([1, 4, 2, 3], [0, 0, 0, 6], [2, 4, 4, 0]),
    ):
        lost = Lost(lost.after)
        state = AdapterState({}, {"w": np.array(wanted, np.float32)})
        (found,) = uploaded(
            upload, 0, [3], [state], [received], [received], lambda name: True, lost=lost
        )
        assert found.dense["w"].tolist() == seen
        assert lost.after[3]["w"].tolist() == left
    # Of another shape, that is of another rank: it begins anew.
    other = AdapterState({}, {"w": np.ones(8, np.float32)})
    start = AdapterState({}, {"w": np.zeros(8, np.float32)})
    lost = Lost(lost.after)
    uploaded(upload, 0, [3], [other], [start], [start], lambda name: True, lost=lost)
    assert lost.after[3]["w"].sum() == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wire": {"up": {"error_feedback": True}}}, "'float32' loses nothing"),
        ({"wire": {"down": {"name": "int8", "error_feedback": True}}}, "the memory is a client's"),
    ],
)
def test_error_feedback_needs_a_codec_of_uploads_that_loses_something(settings, said):
    with pytest.raises(RecipeError, match=said):
        make_recipe(**settings)
