"""The shipped cluster files, as far as they can be checked without a cloud."""

from __future__ import annotations

import copy
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import jsonschema
import kubernetes_validate
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws
from pydantic import BaseModel, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as read_by_autoscaler,
)
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.aws_setup import made_by_setup
from tests.unit.kuberay_schema import RayCluster, RayJob

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHED = ["aws", "local"]
MANIFESTS = ["kuberay", "kuberay-job"]
RAY = {"RayCluster": RayCluster, "RayJob": RayJob}


def loaded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    return content


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Ray's defaults, as `ray up` does."""
    full: dict[str, Any] = prepare_config(copy.deepcopy(config))
    return full


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


def commands(config: dict[str, Any]) -> list[str]:
    return [c for key, value in config.items() if key.endswith("_commands") for c in value]


def cluster_specs() -> list[dict[str, Any]]:
    (cluster,) = (d for d in documents("kuberay") if d["kind"] == "RayCluster")
    (job,) = documents("kuberay-job")
    return [cluster["spec"], job["spec"]["rayClusterSpec"]]


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_up_takes_the_file(name: str) -> None:
    validate_config(prepared(loaded(name)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_key_that_ray_does_not_know_is_refused(name: str) -> None:
    config = loaded(name) | {"idle_timeout_minute": 5}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepared(config))


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_starts_with_the_token_on_every_node(name: str) -> None:
    config = prepared(loaded(name))
    starts = [c for c in commands(config) if re.search(r"\bray start\b", c)]
    assert len(starts) == 2
    for command in starts:
        assert re.search(r"export RAY_AUTH_MODE=token\b.*; ray start ", command)
    # What jobs and shells on the nodes run with.
    assert any("RAY_AUTH_MODE=token" in c for c in config["setup_commands"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["setup_commands"][0] == "chmod 600 ~/.ray/auth_token"


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_dashboard_is_reached_through_the_tunnel_only(name: str) -> None:
    config = prepared(loaded(name))
    (head,) = (c for c in commands(config) if "--head" in c)
    assert "--dashboard-host=127.0.0.1 " in head
    assert not any("0.0.0.0" in command for command in commands(config))


@pytest.mark.parametrize("name", LAUNCHED)
def test_no_command_is_cut_by_a_comment_sign(name: str) -> None:
    # ` #` ends an unquoted YAML scalar: the rest of the command would be lost without a word.
    text = (CLUSTER / f"{name}.yaml").read_text()
    section = text[text.index("\nsetup_commands:") :]
    for line in section.splitlines():
        assert not (line.startswith("  - ") and " #" in line)


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_project_is_installed_from_its_lock(name: str) -> None:
    config = loaded(name)
    for target, source in config["file_mounts"].items():
        if not source.startswith("~"):
            assert (ROOT / source).exists()
            assert target == f"~/rayfed-lora/{source}"
    install, demo = (c for c in config["setup_commands"] if "pip install" in c)
    assert "--constraints constraints.txt" in install
    assert "--no-deps --requirement requirements-demo.txt" in demo
    extra = re.search(r"\.\[(\w+)\]", install)
    assert extra is None or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()


def test_all_that_is_chosen_on_aws_is_used() -> None:
    text = (CLUSTER / "aws.yaml").read_text()
    top, rest = text.split("# ---- What follows from it")
    anchors = re.findall(r"&(\w+)", text)
    assert anchors == re.findall(r"&(\w+)", top)
    assert {*anchors} == {*re.findall(r"\*(\w+)", rest)}


def test_ec2_takes_the_configuration_of_each_node() -> None:
    service = botocore.session.get_session().get_service_model("ec2")
    shape = service.operation_model("RunInstances").input_shape
    for kind in loaded("aws")["available_node_types"].values():
        request = {"MinCount": 1, "MaxCount": 1, **kind["node_config"]}
        report = ParamValidator().validate(request, shape)
        assert not report.has_errors(), report.generate_report()


def test_gpu_nodes_on_aws_go_when_they_are_idle() -> None:
    config = prepared(loaded("aws"))
    assert config["idle_timeout_minutes"] == 10
    workers = {k: v for k, v in config["available_node_types"].items() if k != "head"}
    assert {kind["min_workers"] for kind in workers.values()} == {0}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    assert "InstanceMarketOptions" in workers["gpu_spot"]["node_config"]
    assert "InstanceMarketOptions" not in workers["gpu_on_demand"]["node_config"]
    assert workers["gpu_spot"]["priority"] > workers["gpu_on_demand"].get("priority", 0)


def test_only_ssh_is_open_on_aws() -> None:
    resources = loaded("aws-setup")["Resources"]
    (rule,) = resources["Nodes"]["Properties"]["SecurityGroupIngress"]
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, {"Ref": "SshFrom"})
    between = resources["BetweenNodes"]["Properties"]
    assert between["SourceSecurityGroupId"] == between["GroupId"]
    assert "CidrIp" not in between
    config = loaded("aws")
    name = resources["Nodes"]["Properties"]["GroupName"]
    # Ray adds no rule to a group that has some.
    assert config["provider"]["security_group"] == {"GroupName": name}
    for kind in config["available_node_types"].values():
        assert "SecurityGroupIds" not in kind["node_config"]
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


def test_the_roles_of_the_nodes_are_made_by_the_setup() -> None:
    config, resources = loaded("aws"), loaded("aws-setup")["Resources"]
    made = {
        r["Properties"]["InstanceProfileName"]
        for r in resources.values()
        if r["Type"] == "AWS::IAM::InstanceProfile"
    }
    kinds = config["available_node_types"].values()
    assert {k["node_config"]["IamInstanceProfile"]["Name"] for k in kinds} == made
    head = json.dumps(resources["HeadRole"])
    assert f'"aws:ResourceTag/ray-cluster-name": "{config["cluster_name"]}"' in head


@mock_aws
def test_iam_and_ec2_take_what_the_setup_makes() -> None:
    vpc = boto3.client("ec2", region_name="us-west-2").create_vpc(CidrBlock="10.0.0.0/24")
    made_by_setup(vpc["Vpc"]["VpcId"])
    profiles = boto3.client("iam", region_name="us-west-2").list_instance_profiles()
    names = [p["InstanceProfileName"] for p in profiles["InstanceProfiles"]]
    assert sorted(names) == ["rayfed-lora-head", "rayfed-lora-worker"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name: str) -> None:
    for document in documents(name):
        model = RAY.get(document["kind"])
        if model is None:
            kubernetes_validate.validate(document, "1.33", strict=True)
        else:
            model.model_validate(document)
    for spec in cluster_specs():
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
            kubernetes_validate.validate(template, "1.33", strict=True)


def test_the_autoscaler_reads_gpu_pods_out_of_the_manifest() -> None:
    (cluster,) = (d for d in documents("kuberay") if d["kind"] == "RayCluster")
    cluster["metadata"]["namespace"] = "default"
    config = read_by_autoscaler(cluster)
    validate_config(config)
    assert (config["max_workers"], config["idle_timeout_minutes"]) == (4, 10)
    gpu = config["available_node_types"]["gpu"]
    # 28 Gi = 28 * 2**30
    assert gpu["resources"] == {"CPU": 8, "GPU": 1, "memory": 30_064_771_072}
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["GPU"] == 0


@pytest.mark.parametrize("model", [RayCluster, RayJob], ids=["RayCluster", "RayJob"])
def test_a_key_that_kuberay_does_not_know_is_refused(model: type[BaseModel]) -> None:
    name = "kuberay" if model is RayCluster else "kuberay-job"
    (document,) = (d for d in documents(name) if d["kind"] == model.__name__)
    document["spec"]["idleTimeoutSecond"] = 5
    with pytest.raises(ValidationError, match="idleTimeoutSecond"):
        model.model_validate(document)


def test_both_clusters_on_kubernetes_are_the_same() -> None:
    one, other = cluster_specs()
    assert one == other
    assert one["authOptions"] == {"mode": "token"}
    assert one["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert one["workerGroupSpecs"][0]["minReplicas"] == 0


def test_every_pod_has_the_shared_folder_and_fixed_resources() -> None:
    claim = documents("kuberay")[0]["metadata"]["name"]
    spec = cluster_specs()[0]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim}
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/runs"}]
        assert container["resources"]["limits"] == container["resources"]["requests"]


def test_pods_are_reached_from_their_namespace_and_by_kuberay_only() -> None:
    (policy,) = (d["spec"] for d in documents("kuberay") if d["kind"] == "NetworkPolicy")
    labels = policy["podSelector"]["matchLabels"]
    spec = cluster_specs()[0]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == labels
    ((namespace, kuberay),) = (rule["from"] for rule in policy["ingress"])
    assert namespace == {"podSelector": {}}
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert kuberay["podSelector"]["matchLabels"] == operator


def test_the_image_and_the_manifests_have_the_ray_of_the_lock() -> None:
    locked = version("ray")
    assert f"FROM rayproject/ray:{locked}-py311-cpu" in (CLUSTER / "Dockerfile").read_text()
    assert {spec["rayVersion"] for spec in cluster_specs()} == {locked}
