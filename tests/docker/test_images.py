"""The composition on a Docker engine: images are built, services started, used, killed, upgraded and stopped."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Picture

from api.client import Client
from tests.docker.engine import ROOT, Engine, NoEngine, engine

pytestmark = [pytest.mark.images, pytest.mark.timeout(900)]

PASSWORD = "a1b2c3"
WORKERS = ("training", "inference")
KILL = r"""
import os, signal, sys
for name in filter(str.isdigit, os.listdir("/proc")):
    words = open(f"/proc/{name}/cmdline").read().split("\0")
    if words[1:3] == ["-m", "worker"]:
        os.kill(int(name), signal.SIGKILL)
"""


@dataclass(frozen=True)
class House:
    """The composition as one of its users has it."""

    engine: Engine
    settings: Path
    address: str

    def compose(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.engine.compose(self.settings, *arguments, check=check)

    def inside(self, service: str, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """In the running container of a service."""
        return self.compose("exec", "--no-TTY", service, *command, check=check)

    def up(self, *arguments: str) -> None:
        """Returns when all of it is healthy."""
        try:
            self.compose("up", "--no-build", "--detach", "--wait", "--wait-timeout", "120", *arguments)
        except subprocess.CalledProcessError:
            print(self.compose("logs", "--tail", "40").stdout, file=sys.stderr)
            raise

    def client(self) -> Client:
        made = self.inside("api", "flowpp", "keys", "create", "--owner", secrets.token_hex(4), "--scope", "admin")
        return Client(self.address, key=made.stdout.strip())

    def containers(self) -> list[dict[str, Any]]:
        """As `docker inspect` has them."""
        named = self.compose("ps", "--all", "--quiet").stdout.split()
        return list(json.loads(self.engine.docker("inspect", *named).stdout))


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    try:
        with engine() as found:
            yield found
    except NoEngine as error:
        pytest.fail(str(error))


def settings(place: Path, **given: str) -> Path:
    """`.env.example`, with a password, a free port and what is given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        given |= {"FLOWPP_PORT": str(free.getsockname()[1]), "REDIS_PASSWORD": PASSWORD, "FLOWPP_VERSION": "tested"}
    example = (ROOT / ".env.example").read_text().splitlines()
    kept = [line for line in example if line.partition("=")[0].lstrip("# ") not in given]
    place.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in given.items())]) + "\n")
    return place


@pytest.fixture(scope="module")
def images(docker: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """Names of services whose images there are."""
    file = settings(tmp_path_factory.mktemp("images") / "flowpp-images.env")
    said = json.loads(docker.compose(file, "--profile", "*", "config", "--format", "json").stdout)["services"]
    bases = [
        line.split()[1]
        for path in (ROOT / "docker").glob("*.Dockerfile")
        for line in path.read_text().splitlines()
        if line.startswith("FROM ")
    ]
    assert all(docker.provide(base) for base in bases)
    built = {said[name]["image"]: said[name]["build"] for name in ("api", "training")}
    for tag, instructions in built.items():
        docker.build(instructions, tag)
    yield {name for name, service in said.items() if service["image"] in built or docker.provide(service["image"])}
    print("stand-ins:", *sorted(docker.stand_ins))
    docker.docker("image", "rm", "--force", *built)


@contextmanager
def running(docker: Engine, file: Path, *services: str) -> Iterator[House]:
    port = next(line for line in file.read_text().splitlines() if line.startswith("FLOWPP_PORT=")).partition("=")[2]
    house = House(docker, file, f"http://127.0.0.1:{port}")
    try:
        house.up(*services)
        yield house
    finally:
        house.compose("--profile", "*", "down", "--volumes", "--timeout", "10", check=False)


@pytest.fixture(scope="module")
def house(docker: Engine, images: set[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with running(docker, settings(tmp_path_factory.mktemp("house") / "flowpp-tested.env")) as made:
        yield made


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


def test_the_api_image_has_no_torch_and_the_workers_has(house: House) -> None:
    ask = ["python", "-c", "import importlib.util as u, flowpp, api, worker; print(u.find_spec('torch') is not None)"]
    assert house.inside("api", *ask).stdout.strip() == "False"
    assert house.inside("training", *ask).stdout.strip() == "True"


def test_nothing_but_volumes_can_be_written(house: House) -> None:
    for service in ("api", *WORKERS):
        for place, can in (("/data", True), ("/tmp", True), ("/opt/flowpp", False), ("/etc", False), ("/", False)):
            tried = house.inside(service, "touch", f"{place}/tried", check=False)
            assert (tried.returncode == 0) is can, (service, place)


def test_no_container_has_a_right_that_it_need_not_have(house: House) -> None:
    for container in house.containers():
        name = container["Name"]
        user = container["Config"]["User"].partition(":")[0]
        assert user.isdigit(), name
        assert int(user) > 0, name
        assert container["HostConfig"]["ReadonlyRootfs"], name
        assert container["HostConfig"]["CapDrop"] == ["ALL"], name
        assert container["HostConfig"]["Memory"] > 0, name
        assert "0.0.0.0" not in json.dumps(container["NetworkSettings"]["Ports"]), name


def test_a_worker_knows_how_much_memory_it_may_take(house: House) -> None:
    said = house.inside("training", "python", "-c", "from flowpp.memory import of_machine; print(of_machine())").stdout
    assert int(said) == 8 * 2**30  # TRAINING_MEMORY of the example


def test_a_user_trains_and_scores(house: House, tmp_path: Path) -> None:
    with house.client() as client:
        tell(client, tmp_path)
    kernels = house.inside("training", "find", "/cache", "-name", "*.so").stdout
    assert kernels.strip(), "compiled into the volume"


def test_a_killed_worker_comes_back_and_its_job_goes_on(house: House, tmp_path: Path) -> None:
    with house.client() as client:
        job = begin(client, tmp_path)
        house.inside("training", "python", "-c", KILL)
        ended = client.jobs.wait(job, timeout=180)
        assert ended.status == "succeeded", ended
        assert steps_of(client, job) == list(range(1, STEPS + 1))
        assert len(client.jobs.attempts(job)) == 2
    restarts = {container["Name"]: container["RestartCount"] for container in house.containers()}
    assert [count for name, count in restarts.items() if "training" in name] == [1]


def test_an_upgrade_in_the_middle_of_a_training_loses_no_step(house: House, tmp_path: Path) -> None:
    with house.client() as client:
        job = begin(client, tmp_path)
        house.up("--force-recreate", "--no-deps", "api", *WORKERS)
        ended = client.jobs.wait(job, timeout=180)
        assert ended.status == "succeeded", ended
        assert steps_of(client, job) == list(range(1, STEPS + 1))
        assert [attempt.status for attempt in client.jobs.attempts(job)] == ["stopped", "succeeded"]


def test_a_killed_redis_has_all_it_was_told(house: House, tmp_path: Path) -> None:
    with house.client() as client:
        tell(client, tmp_path)
        before = [job.model_dump() for job in client.jobs.list()]
        house.compose("kill", "--signal", "KILL", "redis")
        house.up()
        assert [job.model_dump() for job in client.jobs.list()] == before
        tell(client, tmp_path)  # and the workers go on


def test_a_redis_that_was_cut_off_without_a_word_is_used_again_at_once(
    docker: Engine, house: House, tmp_path: Path
) -> None:
    network, redis = f"{house.settings.stem}_default", f"{house.settings.stem}-redis-1"
    docker.docker("network", "disconnect", network, redis)  # packets are lost, and no connection is closed
    time.sleep(30)
    docker.docker("network", "connect", "--alias", "redis", network, redis)
    deadline = time.monotonic() + 15
    while httpx.get(f"{house.address}/readyz", timeout=15).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    with house.client() as client:
        tell(client, tmp_path)


def test_it_stops_within_its_grace_and_says_no_secret(house: House) -> None:
    house.compose("stop")
    ends = {container["Name"]: container["State"]["ExitCode"] for container in house.containers()}
    logs = house.compose("logs", "--no-log-prefix", "api", *WORKERS).stdout
    print(house.compose("logs", "--timestamps", *WORKERS).stdout[-12_000:])  # shown where it fails
    house.up()
    assert len(ends) == 4
    assert set(ends.values()) <= {0, 143}, ends  # 143: by SIGTERM; after its grace it would be 137
    lines = logs.splitlines()
    assert [line for line in lines if line.startswith("{")], "FLOWPP_LOG_FORMAT is json"
    assert all(json.loads(line)["message"] for line in lines if line.startswith("{"))
    assert PASSWORD not in logs


def test_prometheus_scrapes_every_replica(docker: Engine, images: set[str], house: House) -> None:
    if "prometheus" not in images:
        pytest.skip("its image cannot be pulled")
    house.compose("up", "--no-build", "--detach", "--wait", "prometheus")
    deadline = time.monotonic() + 90
    ask = ["wget", "-q", "-O", "-", "http://127.0.0.1:9090/api/v1/query?query=up"]
    healthy: dict[str, str] = {}
    while len(healthy) < 3 and time.monotonic() < deadline:
        found = json.loads(house.inside("prometheus", *ask).stdout)["data"]["result"]
        healthy = {series["metric"]["service"]: series["value"][1] for series in found}
        time.sleep(1)
    assert healthy == {"api": "1", "training": "1", "inference": "1"}
    ask[-1] = "http://127.0.0.1:9090/api/v1/query?query=flowpp_request_duration_seconds_count"
    assert json.loads(house.inside("prometheus", *ask).stdout)["data"]["result"]


def test_grafana_shows_our_dashboard_and_wants_a_password(docker: Engine, images: set[str], tmp_path: Path) -> None:
    if "grafana" not in images:
        pytest.skip("its image cannot be pulled")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = settings(tmp_path / "flowpp-grafana.env", GRAFANA_PASSWORD="sesame", GRAFANA_PORT=str(port))
    with running(docker, file, "grafana"):
        assert httpx.get(f"http://127.0.0.1:{port}/api/search").status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/api/search", auth=("admin", "admin")).status_code == 401
        search = httpx.get(f"http://127.0.0.1:{port}/api/search", auth=("admin", "sesame")).raise_for_status().json()
    assert [found["title"] for found in search if found["type"] == "dash-db"] == ["flowpp"]


def test_the_store_on_s3_keeps_all_over_a_restart(docker: Engine, images: set[str], tmp_path: Path) -> None:
    if "s3" not in images:
        pytest.skip("its image cannot be pulled")
    given = {
        "COMPOSE_PROFILES": "cpu,s3", "FLOWPP_STORE": "s3://flowpp/store", "AWS_ENDPOINT_URL": "http://s3:8333",
        "AWS_ACCESS_KEY_ID": "key-of-ours", "AWS_SECRET_ACCESS_KEY": "secret-of-ours",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with running(docker, settings(tmp_path / "flowpp-s3.env", **given)) as house, house.client() as client:
        job = tell(client, tmp_path)
        house.compose("restart", "s3")
        house.up()
        checkpoint = next(iter(client.checkpoints.list(job)))
        fetched = client.checkpoints.fetch(checkpoint.id, tmp_path / "fetched")
        assert list(fetched.glob("*.safetensors"))
        assert "secret-of-ours" not in house.compose("logs").stdout


def test_the_s3_server_lets_nobody_in_without_keys(docker: Engine, images: set[str], tmp_path: Path) -> None:
    if "s3" not in images:
        pytest.skip("its image cannot be pulled")
    file = settings(tmp_path / "flowpp-s3-open.env")
    docker.compose(file, "up", "--no-build", "--detach", "s3")
    time.sleep(3)
    said = docker.compose(file, "logs", "s3").stdout
    docker.compose(file, "--profile", "*", "down", "--volumes", "--timeout", "1")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in .env" in said


STEPS = 400


def dataset_of(client: Client, place: Path) -> tuple[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 64, (24, 8, 8, 3), np.uint8)
    np.save(place / "images.npy", pixels)
    return client.datasets.upload(place / "images.npy").id, pixels


def begin(client: Client, place: Path) -> str:
    """A training that has taken some steps and a checkpoint, and has many to go."""
    dataset, _ = dataset_of(client, place)
    recipe = {"steps": STEPS, "batch_size": 4, "log_every": 1, "checkpoint_every": 20}
    job = client.training_jobs.create(dataset=dataset, model={"preset": "tiny"}, training=recipe).id
    for event in client.jobs.events(job):
        if event.type == "checkpoint":
            return job
    raise AssertionError(client.jobs.get(job))


def steps_of(client: Client, job: str) -> list[float | None]:
    """Of the metrics, as the job's user has them in the end."""
    return client.jobs.metrics(job).columns["step"]


def tell(client: Client, place: Path) -> str:
    """A user's story: upload, train, score; the id of the training."""
    dataset, pixels = dataset_of(client, place)
    files = []
    for index in range(2):
        files.append(place / f"{index}.png")
        Picture.fromarray(pixels[index]).save(files[-1])
    job = client.training_jobs.create(dataset=dataset, model={"preset": "tiny"}, training={"steps": 3})
    job = client.jobs.wait(job.id, timeout=120)
    assert job.status == "succeeded", job
    scored = client.jobs.wait(client.likelihood_jobs.create(model=job.id, images=files).id, timeout=60)
    assert scored.status == "succeeded", scored
    assert scored.result is not None
    assert len(scored.result["images"]) == 2
    return job.id
