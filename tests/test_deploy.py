"""The files under deploy/: valid for what reads them, and in step with the package and the install script."""

import gzip
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import typer.main
import yaml

from mtrec.cli import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
SCHEMAS = ROOT.parent / "shared" / "kuberay"
MANIFESTS = sorted((DEPLOY / "kuberay").glob("*.yaml"))


@cache
def kuberay_schema(kind: str) -> dict[str, Any]:
    path = SCHEMAS / f"{kind.lower()}.v1.schema.json.gz"
    if not path.is_file():
        pytest.skip("KubeRay's schemas are not beside the repository")
    schema: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return schema


def unknown_keys(value: Any, schema: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Paths of keys that the schema does not list; it forbids none by itself."""
    if isinstance(value, dict):
        properties = schema.get("properties")
        for key, below in value.items():
            if properties is not None and key in properties:
                yield from unknown_keys(below, properties[key], f"{place}.{key}")
            elif isinstance(schema.get("additionalProperties"), dict):
                yield from unknown_keys(below, schema["additionalProperties"], f"{place}.{key}")
            elif properties is not None:
                yield f"{place}.{key}"
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from unknown_keys(below, schema.get("items", {}), f"{place}[{index}]")


def without_metadata(tree: Any) -> Any:
    """The resource's own metadata is Kubernetes' (ObjectMeta), not in the resource's schema."""
    return {key: value for key, value in tree.items() if key != "metadata"}


def cluster_spec(tree: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = tree["spec"].get("rayClusterSpec", tree["spec"])
    return spec


def pods(tree: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(tree)
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def test_all_manifests_are_there() -> None:
    assert [path.name for path in MANIFESTS] == ["raycluster.yaml", "rayjob-score.yaml", "rayjob-train.yaml"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_follow_kuberays_schema(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    schema = kuberay_schema(tree["kind"])
    jsonschema.Draft202012Validator(schema).validate(tree)
    assert not list(unknown_keys(without_metadata(tree), schema))


def test_a_wrong_manifest_is_found() -> None:
    tree = yaml.safe_load(MANIFESTS[0].read_text())
    schema = kuberay_schema(tree["kind"])
    tree["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resourcess"] = {}
    assert list(unknown_keys(without_metadata(tree), schema)) == [
        ".spec.workerGroupSpecs[0].template.spec.containers[0].resourcess"
    ]
    tree["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    with pytest.raises(jsonschema.ValidationError, match="'8' is not of type 'integer'"):
        jsonschema.Draft202012Validator(schema).validate(tree)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_what_every_cluster_must_have(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    spec = cluster_spec(tree)
    assert spec["authOptions"] == {"mode": "token", "secretName": "mtrec-ray-token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for pod in pods(tree):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted["shared"] == "/mnt/shared"
        assert {volume["name"] for volume in pod["volumes"]} == mounted.keys()


def test_gpus_are_asked_for_by_the_workers_alone() -> None:
    for name in ("raycluster.yaml", "rayjob-train.yaml"):
        head, worker = pods(yaml.safe_load((DEPLOY / "kuberay" / name).read_text()))
        assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
        assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert worker["containers"][0]["image"].endswith("-cuda")


def test_the_cluster_launchers_file_follows_rays_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    tree = yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())
    jsonschema.validate(tree, schema)
    assert tree["max_workers"] == len(tree["provider"]["worker_ips"])
    for commands in (tree["head_start_ray_commands"], tree["worker_start_ray_commands"]):
        assert any("RAY_AUTH_MODE=token ray start" in command for command in commands)


def test_versions_are_those_of_the_pins() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    pinned = dict(line.split("==") for line in (DEPLOY / "constraints-cpu.txt").read_text().split() if "==" in line)
    for path in [*MANIFESTS, DEPLOY / "ray-cluster.yaml"]:
        text = path.read_text()
        assert set(re.findall(r"mtrec:([\d.]+)-", text)) == {version}
        assert set(re.findall(r'rayVersion: "(.*?)"', text)) <= {pinned["ray"]}
    assert any("rayVersion" in path.read_text() for path in MANIFESTS)


def commands_in(path: Path) -> list[list[str]]:
    """The arguments of every `mtrec ...` of a file: of lines in Markdown's code, of a manifest's entrypoint."""
    text = path.read_text()
    if path.suffix == ".md":
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
        lines = [line.split("#")[0] for line in blocks.splitlines()]
        inline = re.findall(r"`(mtrec [^`\n]*)`", text)
        return [shlex.split(line)[1:] for line in [*lines, *inline] if line.strip().startswith("mtrec ")]
    entrypoint = yaml.safe_load(text)["spec"].get("entrypoint")
    return [shlex.split(entrypoint)[1:]] if entrypoint else []


def parse(arguments: list[str]) -> None:
    """Raises what the command line raises for arguments that it does not accept; runs nothing."""
    group: Any = typer.main.get_command(app)
    while arguments and hasattr(group, "commands"):
        assert arguments[0] in group.commands, f"mtrec has no command {arguments[0]}"
        group, arguments = group.commands[arguments[0]], arguments[1:]
    context = group.make_context(group.name, list(arguments))
    if group.name == "submit":
        parse([context.params["command"], *context.args])


@pytest.mark.parametrize("path", [*MANIFESTS[1:], DEPLOY / "README.md"], ids=lambda path: path.name)
def test_every_command_is_one_that_the_command_line_accepts(path: Path) -> None:
    commands = commands_in(path)
    assert commands
    for arguments in commands:
        parse(arguments)


def test_a_command_that_is_not_accepted_is_found() -> None:
    with pytest.raises(AssertionError, match="no command trian"):
        parse(["trian", "x.yaml"])
    with pytest.raises(Exception, match="--wokers"):
        parse(["submit", "train", "x.yaml", "--wokers", "2"])


def test_the_image_is_installed_by_the_install_script() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    steps = re.findall(r"^RUN (.*?)(?<!\\)$", text, re.DOTALL | re.MULTILINE)
    assert "deploy/install.sh ${DEVICE}" in steps
    assert not [step for step in steps if re.search(r"\bpip3? install|torch|fbgemm", step)], "only install.sh installs packages"
    (image,) = re.findall(r"^ARG PYTHON_IMAGE=(.*)$", text, re.MULTILINE)
    assert re.fullmatch(r"python:3\.1[1-4]\.\d+-slim-\w+", image), "a pinned Debian image, for glibc 2.28 or newer"
    assert text.count("FROM ${PYTHON_IMAGE}") == text.count("FROM ") == 2
    assert re.search(r"^ARG DEVICE=cpu$", text, re.MULTILINE)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["mtrec"]


def test_everything_that_the_image_copies_is_there_and_sent() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    kept = {line.removeprefix("!").split("*")[0] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()[:-1]]
    assert "deploy/install.sh" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source.startswith(prefix) for prefix in kept), f"{source} is not in .dockerignore"
