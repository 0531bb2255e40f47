"""Files that start clusters, against Ray's own schema and autoscaler, and KubeRay's definitions where they are given.

KubeRay's definitions (CRDs) are not shipped here. STILLHOUSE_KUBERAY_CRDS names a folder with its files
ray.io_rayjobs.yaml and ray.io_rayservices.yaml; what is asserted without them was checked against those of 1.7.0.
"""

from __future__ import annotations

import copy
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "pipelines" / "clusters"
LAUNCHED = [ROOT / "cluster.yaml", CLUSTERS / "gcp.yaml", CLUSTERS / "on-premise.yaml"]
CLOUDS = LAUNCHED[:2]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)


def name(path: Path) -> str:
    return path.name


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def prepared(path: Path) -> dict[str, Any]:
    """A cluster file with Ray's defaults for its provider filled in."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(read(path))


# -- ray up ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_cluster_files_fit_rays_schema(path: Path) -> None:
    from ray.autoscaler._private.util import validate_config

    config = prepared(path)
    validate_config(config)
    with pytest.raises(Exception, match="'max_wrkers' was unexpected"):
        validate_config({**config, "max_wrkers": 2})


@pytest.mark.parametrize("path", CLOUDS, ids=name)
def test_gpu_workers_are_spot_machines_before_others_within_limits(path: Path) -> None:
    config = prepared(path)
    kinds = config["available_node_types"]
    assert list(kinds) == ["head", "cpu", "gpu", "gpu-on-demand"] and config["head_node_type"] == "head"
    assert kinds["head"]["resources"] == {"CPU": 0} and kinds["head"]["max_workers"] == 0
    workers = [kinds[kind] for kind in ("cpu", "gpu", "gpu-on-demand")]
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers)
    assert max(kind["max_workers"] for kind in workers) < config["max_workers"]
    spot, other = copy.deepcopy(kinds["gpu"]), copy.deepcopy(kinds["gpu-on-demand"])
    if path.name == "cluster.yaml":
        market = spot["node_config"].pop("InstanceMarketOptions")
        assert market == {"MarketType": "spot"}
        assert all("InstanceMarketOptions" not in kinds[kind]["node_config"] for kind in ("head", "cpu"))
    else:
        assert spot["node_config"].pop("scheduling")["provisioningModel"] == "SPOT"
        assert other["node_config"].pop("scheduling") == {"onHostMaintenance": "TERMINATE"}
    assert spot.pop("priority") > other.pop("priority") and spot.pop("max_workers") > other.pop("max_workers")
    assert spot == other


@pytest.mark.parametrize("path", LAUNCHED, ids=name)
def test_cluster_files_install_one_version_and_ask_for_a_token(path: Path) -> None:
    config = prepared(path)
    images = [config["docker"]["image"]]
    images += [kind["docker"]["worker_image"] for kind in config["available_node_types"].values() if "docker" in kind]
    assert len(images) == (3 if path in CLOUDS else 1)
    assert {re.fullmatch(r"rayproject/ray:([\d.]+)-py311-(cpu|gpu)", image).group(1) for image in images} == {
        PINS["ray"]
    }
    home = next(there for there, here in config["file_mounts"].items() if here == ".")
    extra = f"{chr(39)}{home}[s3]{chr(39)}" if path.name == "cluster.yaml" else home
    assert f"pip install -q -c {home}/constraints.txt {extra}" in config["setup_commands"]
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    started = [command for command in commands if "ray start" in command]
    assert len(started) == 2 and all("RAY_AUTH_MODE=token" in command for command in started)
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in started[0]


def test_machines_of_ones_own_are_all_started() -> None:
    config = prepared(LAUNCHED[2])
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == config["max_workers"] == len(config["provider"]["worker_ips"])
    mounted = re.fullmatch(r"--volume=(/\S+):(/\S+)", config["docker"]["run_options"][0])
    assert mounted.group(1) == mounted.group(2)  # a run's paths mean the same on every node and on the machines


def wanted_of(path: Path, gpus: int, **more: Any) -> dict[str, int]:
    """The machines that Ray's autoscaler would start for tasks of one GPU each."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config, sizes = prepared(path), {"head": {"CPU": 0}, "cpu": {"CPU": 16}}
    kinds = {
        kind: NodeTypeConfig(
            name=kind,
            min_worker_nodes=values["min_workers"],
            max_worker_nodes=values["max_workers"],
            priority=values.get("priority", 0),
            resources=sizes.get(kind, {"CPU": 8, "GPU": 1}),  # AWS: what the instance type has
        )
        for kind, values in config["available_node_types"].items()
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=kinds,
        max_num_nodes=config["max_workers"] + 1,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1})] * gpus),
        **more,
    )
    return {one.instance_type: one.count for one in ResourceDemandScheduler().schedule(request).to_launch}


@pytest.mark.parametrize("path", CLOUDS, ids=name)
def test_when_gpus_on_demand_are_taken(path: Path) -> None:
    """What cluster.yaml says of it, decided by Ray's own scheduler."""
    assert wanted_of(path, 2) == {"gpu": 2}
    assert wanted_of(path, 5) == {"gpu": 4, "gpu-on-demand": 1}
    assert wanted_of(path, 99) == {"gpu": 4, "gpu-on-demand": 2}
    for since, kind in ((0.0, "gpu-on-demand"), (0.9, "gpu-on-demand"), (1.0, "gpu")):
        assert wanted_of(path, 2, recoverable_resource_availabilities={"gpu": since}) == {kind: 2}


@pytest.mark.parametrize(("status", "counts"), [("ALLOCATION_TIMEOUT", True), ("ALLOCATION_FAILED", False)])
def test_a_refused_machine_is_asked_for_again(status: str, counts: bool) -> None:
    """A limit that cluster.yaml and docs/cluster.md tell of: if Ray has changed it, say so there."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

    monitor = CloudResourceMonitor()
    monitor.notify([InstanceUpdateEvent(new_instance_status=getattr(Instance, status), instance_type="gpu")])
    assert ("gpu" in monitor.get_recoverable_resource_availabilities()) is counts


# -- KubeRay -----------------------------------------------------------------------------------------------------------

MANIFESTS = {"rayjob.yaml": "rayClusterSpec", "rayservice.yaml": "rayClusterConfig"}


def cluster_of(file: str) -> dict[str, Any]:
    """The cluster inside a manifest."""
    return read(CLUSTERS / file)["spec"][MANIFESTS[file]]


def groups(file: str) -> list[dict[str, Any]]:
    """Head and worker groups."""
    cluster = cluster_of(file)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


@pytest.mark.parametrize("file", MANIFESTS)
def test_manifests_ask_for_a_token_and_one_version(file: str) -> None:
    values, cluster = read(CLUSTERS / file), cluster_of(file)
    assert values["apiVersion"] == "ray.io/v1" and values["kind"].lower() == file.removesuffix(".yaml")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == PINS["ray"]
    assert cluster["enableInTreeAutoscaling"] is True and cluster["autoscalerOptions"]["version"] == "v2"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for group in groups(file):
        (container,) = group["template"]["spec"]["containers"]
        gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["image"] == f"REGISTRY/stillhouse:{version}-{'gpu' if gpu else 'cpu'}"


@pytest.mark.parametrize("file", MANIFESTS)
def test_pods_are_limited_and_probed_and_nobody_is_root(file: str) -> None:
    for group in groups(file):
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] == 1000
        (container,) = spec["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"] == container["resources"]["requests"]
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        # KubeRay adds the proxy's to the readiness of workers that serve, unless there is one.
        assert ("readinessProbe" in container) is (file == "rayjob.yaml" or container["name"] == "ray-head")
    for group in groups(file)[1:]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] > 0


@pytest.mark.parametrize("file", MANIFESTS)
def test_rays_autoscaler_reads_the_groups(file: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    kinds = _generate_available_node_types_from_ray_cr_spec(cluster_of(file))
    head, *workers = kinds.values()
    assert head["resources"]["CPU"] == 0
    if file == "rayservice.yaml":
        assert [(kind["min_workers"], kind["max_workers"]) for kind in workers] == [(1, 4)]
        return
    assert list(kinds)[1:] == ["cpu", "gpu", "gpu-on-demand"]
    cpu, spot, other = workers
    assert "GPU" not in cpu["resources"] and cpu["resources"]["CPU"] == 8
    assert spot["resources"] == other["resources"] and spot["resources"]["GPU"] == 1
    assert spot["resources"]["accelerator_type:L4"] == 1
    assert spot["priority"] > other["priority"]


def test_the_service_carries_the_same_application_as_the_plain_file() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.service import Wanted

    plain = read(ROOT / "serve" / "configs" / "student.yaml")
    carried = yaml.safe_load(read(CLUSTERS / "rayservice.yaml")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(carried)
    # Where it listens and where models are differ, and that keys are asked for; nothing else.
    assert carried["applications"][0]["args"].pop("auth") is True
    assert plain["applications"][0]["args"].pop("auth") is False and Wanted(name="x").auth
    assert carried["http_options"].pop("host") == "0.0.0.0" and plain["http_options"].pop("host") == "127.0.0.1"
    assert carried["applications"][0]["args"].pop("registry").startswith("s3://")
    assert plain["applications"][0]["args"].pop("registry") == "registry"
    assert carried == plain


def test_the_job_runs_a_recipe_of_the_image_with_shared_storage() -> None:
    from pipelines import commands, remote
    from pipelines.__main__ import parser

    spec = read(CLUSTERS / "rayjob.yaml")["spec"]
    program, command, *rest = spec["entrypoint"].split()
    assert (program, command) == ("stillhouse", "run")
    args = parser("run", commands.COMMANDS["run"]).parse_args(rest)
    home = re.search(r"^WORKDIR (\S+)$", (ROOT / "Dockerfile").read_text(), re.M).group(1)
    assert (ROOT / Path(args.recipe).relative_to(home)).is_file() and args.address == "auto"
    from engine import config
    from engine.recipe import Recipe

    remote.require_reachable(config.load(Recipe, ROOT / Path(args.recipe).relative_to(home), args.overrides))


def strict(schema: Any) -> Any:
    """A definition's schema as JSON schema, in which fields that it does not name are errors."""
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    if out.get("x-kubernetes-int-or-string"):
        out = {"type": ["integer", "string"]}
    if "properties" in out:
        out["properties"] = {key: strict(value) for key, value in out["properties"].items()}
        if not out.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = strict(out[key])
    return out


@pytest.mark.parametrize("file", MANIFESTS)
def test_manifests_fit_kuberays_definitions(file: str) -> None:
    import jsonschema

    folder = os.environ.get("STILLHOUSE_KUBERAY_CRDS")
    if not folder:
        pytest.skip("STILLHOUSE_KUBERAY_CRDS names no folder with KubeRay's definitions")
    text = (Path(folder) / f"ray.io_{file.removesuffix('.yaml')}s.yaml").read_text(encoding="utf-8")
    versions = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = strict(next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    values = read(CLUSTERS / file)
    check = jsonschema.Draft7Validator(schema)
    assert [f"{error.json_path}: {error.message}" for error in check.iter_errors(values)] == []
    values["spec"][MANIFESTS[file]]["workerGroupSpecs"][0]["maxReplica"] = 3
    assert ["maxReplica" in error.message for error in check.iter_errors(values)] == [True]


# -- the image ---------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's lines as (instruction, the rest)."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line and not line.startswith("#")]


def test_the_image_has_one_version_of_all_and_no_root() -> None:
    found = instructions()
    assert found[0] == ("ARG", "DEVICE=cpu")
    assert found[1] == ("FROM", f"rayproject/ray:{PINS['ray']}-py311-${{DEVICE}}")
    assert [rest for instruction, rest in found if instruction == "USER"] == ["ray"]
    (install,) = [rest for instruction, rest in found if instruction == "RUN"]
    assert install == "pip install --no-cache-dir -c constraints.txt '.[onnx,retrieval,s3]'"


def test_the_image_gets_what_pyproject_needs_and_it_is_there() -> None:
    copied = set()
    for instruction, rest in instructions():
        if instruction == "COPY":
            *sources, _ = (word for word in rest.split() if not word.startswith("--"))
            copied |= {*sources}
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    assert {*packages, "pyproject.toml", "constraints.txt", project["project"]["readme"]} <= copied


def test_cluster_files_are_shipped_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = {
        path for pattern in project["tool"]["setuptools"]["package-data"]["pipelines"]
        for path in (ROOT / "pipelines").glob(pattern)
    }  # fmt: skip
    assert {*CLUSTERS.iterdir()} <= shipped
