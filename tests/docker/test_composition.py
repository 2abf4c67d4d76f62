"""What docker-compose.yml, the Dockerfiles and .env.example say. `make test-images` does what they say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.observability import FAMILIES
from worker.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSITION = ROOT / "docker-compose.yml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSITION.read_text())["services"]
ONCE = {"s3-volume"}
"""They do something once, and end."""

DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
EXAMPLE = (ROOT / ".env.example").read_text()
FILES = [COMPOSITION, ROOT / ".env.example", *(path for path in (ROOT / "docker").rglob("*") if path.is_file())]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_nothing_that_it_need_not(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    user = str(service["user"]).partition(":")[0]
    assert user.isdigit()
    assert int(user) > 0
    if name in ONCE:
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"]
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    for port in service.get("ports", []):
        assert port.startswith(("127.0.0.1:", "${FLOWPP_ADDRESS:-127.0.0.1}:")), "nothing is published by accident"


def test_images_are_named_by_an_exact_version() -> None:
    own = {service["image"] for service in SERVICES.values() if "build" in service}
    others = [service["image"] for service in SERVICES.values() if service["image"] not in own]
    bases = [
        line.split()[1] for path in DOCKERFILES for line in path.read_text().splitlines() if line.startswith("FROM ")
    ]
    assert len(bases) == 4
    for image in others + bases:
        assert re.search(r":v?\d+(\.\d+)+(-[a-z-]+)?$", image), image


def test_every_variable_of_the_composition_is_in_the_example_and_the_other_way_round() -> None:
    text = COMPOSITION.read_text()
    passed = {name for name, value in SERVICES["api"]["environment"].items() if value is None}
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text)) | passed | {"COMPOSE_PROFILES"}
    assert set(re.findall(r"^(?:# )?([A-Z][A-Z0-9_]+)=", EXAMPLE, re.M)) == used


def test_settings_that_it_gives_are_settings_of_the_service() -> None:
    known = {f"FLOWPP_{name.upper()}" for name in Settings.model_fields}
    given = {name for name in SERVICES["api"]["environment"] if name.startswith("FLOWPP_")}
    for path in DOCKERFILES:
        given |= set(re.findall(r"\b(FLOWPP_\w+)=", path.read_text()))
    assert {"FLOWPP_REDIS_URL", "FLOWPP_DATA_DIRECTORY", "FLOWPP_METRICS_PORT"} <= given <= known


def test_the_redis_server_loses_nothing_unless_it_is_told_to() -> None:
    command = SERVICES["redis"]["command"][-1]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert SERVICES["redis"]["environment"]["APPENDFSYNC"] == "${REDIS_APPENDFSYNC:-always}"
    assert "requirepass" in command
    assert "REDIS_PASSWORD" not in command, "it would be seen among the arguments"


def test_the_api_has_no_torch_and_the_workers_have_that_of_the_lock() -> None:
    locked = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements-service.txt").read_text(), re.M)
    assert {"fastapi", "celery", "safetensors"} <= set(locked)
    assert not [name for name in locked if name.startswith(("torch", "triton", "nvidia", "pytest"))]
    files = {path.name: path.read_text() for path in DOCKERFILES}
    assert "requirements-torch.txt" not in files["api.Dockerfile"]
    assert "-r requirements-torch.txt" in files["worker.Dockerfile"]


def test_the_service_has_the_versions_of_the_other_lock() -> None:
    pins = [
        dict(re.findall(r"^([a-z0-9-]+)(?:\[[a-z,0-9]+\])?==(\S+)", (ROOT / name).read_text(), re.M))
        for name in ("requirements.txt", "requirements-service.txt")
    ]
    assert pins[1].items() <= pins[0].items(), "run `make lock`"


def test_no_registry_is_named() -> None:
    for path in FILES:
        hosts = re.findall(r"https?://([^/\s:\"']+)", path.read_text())
        assert set(hosts) <= {"127.0.0.1", "s3", "prometheus"}, path


def test_every_metric_of_the_dashboard_is_one_that_is_served() -> None:
    dashboard = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "flowpp.json").read_text())
    asked = {
        name for panel in dashboard["panels"] for target in panel["targets"]
        for name in re.findall(r"flowpp_\w+", target["expr"])
    }  # fmt: skip
    served: set[str] = set()
    for family in FAMILIES:
        served |= (
            {family.name + end for end in ("_bucket", "_sum", "_count")}
            if family.kind == "histogram"
            else {family.name}
        )
    assert asked <= served
    assert {family.name for family in FAMILIES if family.kind != "histogram"} <= asked, "and it shows them all"
