"""What KubeRay's API (ray.io/v1) takes, as far as the manifests use it; all else is refused.

KubeRay's own schema is in no package. Field names and types are those of its 1.6 API; pod templates
are left to the Kubernetes schemas.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Text = dict[str, str]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str | None = Field(None, pattern="^[a-z0-9][-a-z0-9]*$", max_length=50)
    generateName: str | None = Field(None, pattern="^[a-z0-9][-a-z0-9]*$", max_length=40)
    labels: Text = {}
    annotations: Text = {}

    @model_validator(mode="after")
    def is_named(self) -> Metadata:
        if (self.name is None) == (self.generateName is None):
            raise ValueError("expected either name or generateName")
        return self


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]
    secretName: str | None = None


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: PositiveInt | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    resources: dict[Literal["limits", "requests"], Text] = {}


class HeadGroup(Strict):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enableIngress: bool | None = None
    rayStartParams: Text
    labels: Text = {}
    template: dict[str, Any]


class WorkerGroup(Strict):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    idleTimeoutSeconds: PositiveInt | None = None
    priority: int | None = None
    rayStartParams: Text
    labels: Text = {}
    template: dict[str, Any]

    @model_validator(mode="after")
    def is_in_range(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError("expected minReplicas <= replicas <= maxReplicas")
        return self


class ClusterSpec(Strict):
    rayVersion: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Strict):
    entrypoint: str
    backoffLimit: int | None = Field(None, ge=0)
    activeDeadlineSeconds: PositiveInt | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int | None = Field(None, ge=0)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None = (
        None
    )
    metadata: Text = {}
    runtimeEnvYAML: str | None = None
    rayClusterSpec: ClusterSpec

    @model_validator(mode="after")
    def has_a_cluster_to_delete(self) -> JobSpec:
        if self.ttlSecondsAfterFinished is not None and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec
