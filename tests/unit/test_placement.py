"""How many actors a cluster holds, counted by hand."""

from __future__ import annotations

import pytest

from rayfed_lora.engines.on_ray.placement import Layout, Node, layout, nodes_of
from rayfed_lora.errors import ResourceError
from rayfed_lora.recipe.runtime import Runtime

LAPTOP = [Node(cpus=4, gpus=0)]
ONE_CARD = [Node(cpus=8, gpus=1)]


def runtime(**values: object) -> Runtime:
    return Runtime(**values)


@pytest.mark.parametrize(
    ("share", "cpus", "actors"),
    # How many shares lie on one card (a share is on one card); CPUs permitting.
    [
        (0.5, 1, 4),
        (0.25, 1, 8),
        (0.3, 1, 6),
        (0.75, 1, 2),
        (1, 1, 2),
        (0.1, 1, 16),
        (0.1, 4, 4),
    ],
)
def test_as_many_actors_as_two_cards_and_sixteen_cpus_hold(share, cpus, actors):
    nodes = [Node(cpus=16, gpus=2)]
    plan = layout(runtime(gpus_per_actor=share, cpus_per_actor=cpus), nodes, most=1000)
    assert plan == Layout(actors, float(cpus), float(share))


def test_a_share_never_spans_two_machines():
    # 1 card each: actors of 0.75, one a machine.
    nodes = [Node(8, 1), Node(8, 1), Node(64, 0)]
    assert layout(runtime(gpus_per_actor=0.75), nodes, 1000).actors == 2


def test_without_a_gpu_the_same_recipe_takes_cpu_shares():
    plan = layout(runtime(gpus_per_actor=0.5, cpus_per_actor=2), LAPTOP, 1000)
    # Its second core trains a second block.
    assert plan == Layout(actors=2, cpus=2.0, gpus=0.0, trainers=2)
    assert plan.bundle == {"CPU": 2.0}


def test_auto_takes_a_whole_gpu_where_there_is_one_and_none_where_not():
    assert layout(runtime(), ONE_CARD, 1000) == Layout(1, 1.0, 1.0)
    assert layout(runtime(), LAPTOP, 1000) == Layout(4, 1.0, 0.0)


def test_device_cpu_leaves_gpus_alone():
    assert layout(runtime(device="cpu"), ONE_CARD, 1000) == Layout(8, 1.0, 0.0)
    assert layout(runtime(device="cpu", gpus_per_actor=0.5), ONE_CARD, 5).gpus == 0


def test_auto_starts_no_more_actors_than_can_be_busy():
    assert layout(runtime(), LAPTOP, most=3).actors == 3


def test_a_number_of_actors_that_is_asked_for_is_what_one_gets():
    assert layout(runtime(client_actors=3), LAPTOP, most=2).actors == 3


def test_a_bundle_names_cpus_and_gpus():
    assert Layout(2, 1.0, 0.5).bundle == {"CPU": 1.0, "GPU": 0.5}


def test_cpu_fractions_that_are_not_exact_in_binary_are_counted_right():
    # 0.1 * 3 is above 0.3 in floats, yet three actors of 0.1 fit into 0.3.
    assert layout(runtime(cpus_per_actor=0.1), [Node(0.3, 0)], 1000).actors == 3


def test_more_actors_than_fit_are_refused_with_all_the_numbers():
    with pytest.raises(ResourceError) as refused:
        layout(runtime(client_actors=9, gpus_per_actor=0.25), [Node(8, 1), Node(2, 1)], 1000)
    message = str(refused.value)
    assert "cannot hold 9 client actors of 1 CPU and 0.25 GPU each" in message
    # 4 shares on the first card; on the second machine 2 CPUs are the limit.
    assert "it holds 6" in message
    assert "Nodes: 8 CPU, 1 GPU; 2 CPU, 1 GPU" in message
    assert refused.value.exit_status == 2


def test_auto_on_a_machine_too_small_for_one_actor_is_refused():
    with pytest.raises(ResourceError, match=r"cannot hold 1 client actors of 8 CPU each.*holds 0"):
        layout(runtime(cpus_per_actor=8), LAPTOP, 1000)


def test_a_cluster_without_a_node_is_refused():
    with pytest.raises(ResourceError, match="no live node"):
        layout(runtime(), [], 1000)


def test_device_cuda_without_a_gpu_says_what_is_missing_and_what_to_do():
    with pytest.raises(ResourceError) as refused:
        layout(runtime(device="cuda"), LAPTOP, 1000)
    message = str(refused.value)
    assert "needs a GPU, the cluster has none. Nodes: 4 CPU, 0 GPU" in message
    assert "'auto'" in message


def test_dead_nodes_and_missing_resources_count_as_nothing():
    found = nodes_of(
        [
            {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}},
            {"Alive": True, "Resources": {}},
            {"Alive": False, "Resources": {"CPU": 64.0}},
        ]
    )
    assert found == [Node(4.0, 1.0), Node(0.0, 0.0)]
