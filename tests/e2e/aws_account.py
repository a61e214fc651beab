"""An account on a mock of AWS, as commands that print JSON.

`make KEY` sets it up, `show` tells of its instances, `read FILE` prints a file of the bucket.

Run beside the machines: only from there is the mock reached.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import boto3

from tests.aws_setup import REGION, VALUES, made_by_setup
from tests.e2e.hosts import NETWORK


def make(public_key: str) -> dict[str, str]:
    """Make a network with the machines' addresses, a key pair and what aws-setup.yaml makes."""
    ec2 = boto3.client("ec2", region_name=REGION)
    block = f"{NETWORK}.0/24"
    vpc = ec2.create_vpc(CidrBlock=block)["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock=block, AvailabilityZone=f"{REGION}a")
    ec2.import_key_pair(KeyName="test", PublicKeyMaterial=Path(public_key).read_bytes())
    made_by_setup(vpc)
    return {"subnet": subnet["Subnet"]["SubnetId"]}


def show() -> dict[str, Any]:
    """Return the instances that run, by address, and the rules of their security groups."""
    ec2 = boto3.client("ec2", region_name=REGION)
    found = ec2.describe_instances(
        Filters=[{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    )
    instances = [i for r in found["Reservations"] for i in r["Instances"]]
    groups = sorted({g["GroupId"] for i in instances for g in i["SecurityGroups"]})
    rules = ec2.describe_security_groups(GroupIds=groups)["SecurityGroups"] if groups else []
    return {
        "instances": {
            i["PrivateIpAddress"]: {
                "type": i["InstanceType"],
                "market": i.get("InstanceLifecycle"),
                "profile": i.get("IamInstanceProfile", {}).get("Arn", "").split("/")[-1],
            }
            for i in instances
        },
        "ports": sorted({str(p.get("FromPort")) for g in rules for p in g["IpPermissions"]}),
        "from": sorted(
            r["CidrIp"] for g in rules for p in g["IpPermissions"] for r in p["IpRanges"]
        ),
    }


def read(name: str) -> Any:
    """Return a JSON file of the bucket."""
    s3 = boto3.client("s3", region_name=REGION)
    return json.loads(s3.get_object(Bucket=VALUES["Bucket"], Key=name)["Body"].read())


if __name__ == "__main__":
    print(json.dumps({"make": make, "show": show, "read": read}[sys.argv[1]](*sys.argv[2:])))
