"""cluster/aws-setup.yaml carried out call by call, where no CloudFormation is to be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boto3
import yaml

TEMPLATE = Path(__file__).parents[1] / "cluster" / "aws-setup.yaml"
REGION = "us-west-2"
VALUES = {
    "AWS::Partition": "aws",
    "AWS::AccountId": "123456789012",
    "Bucket": "runs-of-a-test",
    "SshFrom": "203.0.113.7/32",
}


def resolved(value: Any) -> Any:
    """Return a part of the template with its functions replaced by what they could give."""
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "Fn::Sub" in value:
        text = value["Fn::Sub"]
        for name, content in VALUES.items():
            text = text.replace(f"${{{name}}}", content)
        return text
    if "Fn::GetAtt" in value:
        return f"arn:aws:iam::{VALUES['AWS::AccountId']}:role/{value['Fn::GetAtt'][0]}"
    if value.keys() == {"Ref"}:
        return VALUES.get(value["Ref"], value["Ref"])
    return {key: resolved(item) for key, item in value.items()}


def made_by_setup(vpc: str) -> None:
    """Make bucket, roles, profiles and security group through the services that take them."""
    resources = resolved(yaml.safe_load(TEMPLATE.read_text())["Resources"])
    made = {name: resource["Properties"] for name, resource in resources.items()}
    _make_bucket(made["Runs"])
    _make_roles(made)
    _make_group(made, vpc)


def _make_bucket(properties: dict[str, Any]) -> None:
    s3 = boto3.client("s3", region_name=REGION)
    name = properties["BucketName"]
    s3.create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
    access = properties["PublicAccessBlockConfiguration"]
    s3.put_public_access_block(Bucket=name, PublicAccessBlockConfiguration=access)


def _make_roles(made: dict[str, dict[str, Any]]) -> None:
    iam = boto3.client("iam", region_name=REGION)
    document = json.dumps(made["UseRuns"]["PolicyDocument"])
    arn = iam.create_policy(PolicyName="UseRuns", PolicyDocument=document)["Policy"]["Arn"]
    for role, profile in (("WorkerRole", "WorkerProfile"), ("HeadRole", "HeadProfile")):
        trust = json.dumps(made[role]["AssumeRolePolicyDocument"])
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)
        assert made[role]["ManagedPolicyArns"] == ["UseRuns"]
        iam.attach_role_policy(RoleName=role, PolicyArn=arn)
        for policy in made[role].get("Policies", []):
            document = json.dumps(policy["PolicyDocument"])
            name = policy["PolicyName"]
            iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=document)
        name = made[profile]["InstanceProfileName"]
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=role)


def _make_group(made: dict[str, dict[str, Any]], vpc: str) -> None:
    ec2 = boto3.client("ec2", region_name=REGION)
    properties = made["Nodes"]
    group = ec2.create_security_group(
        GroupName=properties["GroupName"], Description=properties["GroupDescription"], VpcId=vpc
    )["GroupId"]
    for rule in properties["SecurityGroupIngress"]:
        ec2.authorize_security_group_ingress(GroupId=group, **rule)
    between = {
        "IpProtocol": made["BetweenNodes"]["IpProtocol"],
        "UserIdGroupPairs": [{"GroupId": group}],
    }
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[between])
