"""A Ray cluster seen from outside: its address, its token, what it has, and what went wrong, in words."""

import dataclasses
import json
import logging
import os
import platform
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's own order
CONNECT_SECONDS = 10
OLDEST_RAY, OLDEST_PYTHON = (2, 60), (3, 11)
TOKEN_HELP = (
    "Put the cluster's token into ~/.ray/auth_token, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH. On the head, "
    "`ray get-auth-token` prints it."
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What a cluster says of itself. `cpus`, `gpus`: of all living nodes, free or not."""

    address: str
    ray_version: str
    python_version: str
    nodes: int
    cpus: int
    gpus: int


def choose_address(given: str | None) -> tuple[str, str | None]:
    """(address of the dashboard, a line to print or None).

    `--address` wins; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS; else this machine's port 8265. Raises ValueError where the
    address is not one of a dashboard.
    """
    found = [(name, os.environ[name]) for name in ADDRESS_VARIABLES if os.environ.get(name)]
    note = None
    if given is not None:
        address, origin = given, "--address"
        others = [f"{name}={value}" for name, value in found if value.rstrip("/") != given.rstrip("/")]
        if others:
            note = f"--address {given} is used; {' and '.join(others)} is ignored."
    elif found:
        origin, address = found[0]
        note = f"{address} from {origin} is used."
    else:
        origin, address = "the default address", DEFAULT_ADDRESS
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            f"{origin} should be the address of the cluster's dashboard, such as http://HEAD:8265. Found '{address}'."
            + ("" if given is not None else " Name the dashboard with --address.")
        )
    return address.rstrip("/"), note


def find_token(environment: Mapping[str, str]) -> str | None:
    """Where this user's token for Ray comes from: the name of a variable or a file; None without one."""
    if environment.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    if environment.get("RAY_AUTH_TOKEN_PATH"):
        return environment["RAY_AUTH_TOKEN_PATH"]
    path = Path.home() / ".ray" / "auth_token"
    return str(path) if path.is_file() else None


def use_token() -> None:
    """Lets Ray's client send the token: it sends none while RAY_AUTH_MODE is unset. Changes this process only."""
    if "RAY_AUTH_MODE" not in os.environ and find_token(os.environ) is not None:
        os.environ["RAY_AUTH_MODE"] = "token"  # read when ray is imported


def connect_client(address: str) -> Any:
    """A `ray.job_submission.JobSubmissionClient`. Raises ValueError in words where the cluster cannot be used."""
    _check_reachable(address)
    use_token()
    for name in ADDRESS_VARIABLES:
        os.environ.pop(name, None)  # they would win over the address given
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    quiet = ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging")
    for name in quiet:
        logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # they set themselves to INFO
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ValueError(token_problem(address, str(error))) from None
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ValueError(f"{address} does not answer as Ray's dashboard does: {error}") from None


def _check_reachable(address: str) -> None:
    """An answer of any kind; whether it is the right one is asked with the token afterwards."""
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
        raise ValueError(
            f"{address} answers, but not as Ray's dashboard does (HTTP {error.code}). "
            "Is it the port of the dashboard, 8265 by default?"
        ) from None
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"Cannot reach the Ray cluster at {address}: {reason}. Is the address that of the head's dashboard (port 8265), "
            "and is it open to this machine? Through SSH: ssh -L 8265:127.0.0.1:8265 HEAD, then --address http://127.0.0.1:8265"
        ) from None


def token_problem(address: str, message: str) -> str:
    """What to do about a missing (401) or wrong (403) token."""
    source = find_token(os.environ)
    if "Authentication failed" in message:
        return f"The cluster at {address} refuses the token of {source or 'this machine'}: it is not this cluster's. {TOKEN_HELP}"
    if source is not None and os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"The cluster at {address} asks for a token; the one of {source} was not sent, because RAY_AUTH_MODE is "
            f"'{os.environ.get('RAY_AUTH_MODE')}'. Unset RAY_AUTH_MODE or set it to token."
        )
    return f"The cluster at {address} asks for a token, and there is none on this machine. {TOKEN_HELP}"


def describe(client: Any, address: str) -> Cluster:
    """Versions and resources of the cluster, from its dashboard."""
    versions = _get(client, "/api/v0/cluster_metadata")
    nodes = _get(client, "/api/v0/nodes?detail=1")["result"]["result"]
    alive = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
    return Cluster(
        address=address,
        ray_version=versions["rayVersion"],
        python_version=versions["pythonVersion"],
        nodes=len(alive),
        cpus=int(sum(each.get("CPU", 0) for each in alive)),
        gpus=int(sum(each.get("GPU", 0) for each in alive)),
    )


def _get(client: Any, path: str) -> dict[str, Any]:
    response = client._do_request("GET", path)
    if response.status_code != 200:
        raise ValueError(f"The cluster's dashboard did not answer {path}: HTTP {response.status_code} {response.text[:200]}")
    answer: dict[str, Any] = json.loads(response.text)["data"]
    return answer


def check_versions(cluster: Cluster) -> list[str]:
    """Lines on what differs between the cluster and this machine. Raises ValueError where mtrec cannot run there."""
    for name, found, oldest in (
        ("Ray", cluster.ray_version, OLDEST_RAY),
        ("Python", cluster.python_version, OLDEST_PYTHON),
    ):
        if tuple(int(part) for part in found.split(".")[:2]) < oldest:
            raise ValueError(
                f"The cluster at {cluster.address} runs {name} {found}; mtrec needs {'.'.join(map(str, oldest))} or newer. "
                "deploy/README.md says how to upgrade it."
            )
    import ray

    lines = []
    for name, there, here in (
        ("Ray", cluster.ray_version, ray.__version__),
        ("Python", cluster.python_version, platform.python_version()),
    ):
        if there.split(".")[:2] != here.split(".")[:2]:
            lines.append(f"the cluster runs {name} {there}, this machine {here}: the job runs with the cluster's")
    return lines


def check_workers(least: int | None, cpus: int, gpus: int, where: str) -> None:
    """Raises ValueError where the cluster is too small for the workers asked: one GPU each, or one CPU where it has no GPU."""
    have, unit = (gpus, "GPUs") if gpus else (cpus, "CPUs")
    if least is not None and least > have:
        raise ValueError(
            f"--workers {least} needs {least} {unit}. {where} has {cpus} CPUs and {gpus} GPUs. "
            f"Ask for at most {have}, or for a range such as --workers 1:{least}."
        )
