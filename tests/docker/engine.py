"""A Docker engine for the tests: the one that answers, or one that is started for them alone; and images for it.

Where no registry of images is reached, stand-ins have their names: Debian's python for the base image, and the servers
that package registries ship, of other versions (`stand_ins/`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.environment import INHERITED

ROOT = Path(__file__).parents[2]
STAND_INS = Path(__file__).with_name("stand_ins")
PYTHON = "python:3.11.15-slim-bookworm"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_LABEL = "flowpp.stand-in"
_DEBIANS = "/usr/bin/docker"
"""Of Debian's package docker.io; it builds by BuildKit without a plugin, which newer ones do not."""


class NoEngine(Exception):
    """There is no Docker engine, and none can be started."""


@dataclass
class Engine:
    """An engine that answers at `host`, or where docker finds one by itself."""

    place: Path
    host: str = ""
    torch_index: str = os.environ.get("TORCH_INDEX", "")
    stand_ins: set[str] = field(default_factory=set)

    @property
    def environment(self) -> dict[str, str]:
        return INHERITED | {"DOCKER_BUILDKIT": "1"} | ({"DOCKER_HOST": self.host} if self.host else {})

    def docker(self, *arguments: str, check: bool = True, **given: Any) -> subprocess.CompletedProcess[str]:
        """Raises `CalledProcessError`, whose output is shown."""
        program = _DEBIANS if Path(_DEBIANS).exists() else "docker"
        return self._run([program, *arguments], check, given)

    def compose(
        self, settings: Path, *arguments: str, check: bool = True, **given: Any
    ) -> subprocess.CompletedProcess[str]:
        """docker compose with the composition of this repository. Raises `CalledProcessError`, as `docker`."""
        program = str(Path(sys.executable).with_name("docker-compose"))
        where = ["--project-directory", str(ROOT), "--env-file", str(settings), "--project-name", settings.stem]
        return self._run([program, *where, *arguments], check, given)

    def _run(self, command: list[str], check: bool, given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, **given)
        if check and done.returncode:
            print(" ".join(command), done.stdout[-3000:], done.stderr[-6000:], sep="\n", file=sys.stderr)
            done.check_returncode()
        return done

    def provide(self, image: str) -> bool:
        """Whether there is the image: pulled, or a stand-in for it."""
        if (found := self.docker("image", "inspect", image, check=False)).returncode == 0:
            labels = json.loads(found.stdout)[0]["Config"]["Labels"] or {}
            if _LABEL in labels:
                self._note_stand_in(image)
            return True
        if self.docker("pull", "--quiet", image, check=False).returncode == 0:
            return True
        if image == PYTHON:
            self._stand_in_for_python()
        elif (file := STAND_INS / f"{image.rpartition('/')[2].partition(':')[0]}.Dockerfile").exists():
            self.provide(PYTHON)
            self.docker("build", "--file", str(file), "--tag", image, str(STAND_INS))
        else:
            return False
        self._note_stand_in(image)
        return True

    def build(self, said: dict[str, Any], tag: str) -> None:
        """As the composition's `build` says."""
        given = {"TORCH_INDEX": self.torch_index} if self.torch_index else {}
        arguments = said.get("args", {}) | ({name: given[name] for name in given if name in said.get("args", {})})
        options = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        context = Path(said["context"])
        self.docker("build", "--file", str(context / said["dockerfile"]), *options, "--tag", tag, str(context))

    def _stand_in_for_python(self) -> None:
        """Debian with its python where the base image has it, and this machine's way to packages."""
        system = self.place / "debian"
        included = "python3,python3-venv,python3-pip,ca-certificates"
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={included}", "bookworm", str(system)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        (system / "usr/local/bin/python").symlink_to("/usr/bin/python3")
        shutil.copyfile(_CERTIFICATES, system / _CERTIFICATES.relative_to("/"))
        gateway = self._gateway()
        (system / "etc/pip.conf").write_text(f"[global]\ncert = {_CERTIFICATES}\ntrusted-host = {gateway}\n")
        path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        with subprocess.Popen(["tar", "-C", str(system), "-c", "."], stdout=subprocess.PIPE) as packed:
            changes = ["--change", f"ENV {path}", "--change", f"LABEL {_LABEL}=1"]
            self.docker("import", *changes, "-", PYTHON, stdin=packed.stdout)
        shutil.rmtree(system)

    def _note_stand_in(self, image: str) -> None:
        self.stand_ins.add(image)
        if image == PYTHON and not self.torch_index:
            self.torch_index = self._serve_torch(self._gateway())

    def _gateway(self) -> str:
        """This machine's address as containers see it."""
        said = json.loads(self.docker("network", "inspect", "bridge").stdout)
        return str(said[0]["IPAM"]["Config"][0].get("Gateway") or "172.17.0.1")

    def _serve_torch(self, gateway: str) -> str:
        """The URL of an index that has the build of torch that this machine's pip takes."""
        index = self.place / "index"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(index / "torch")]
        subprocess.run([*command, "--requirement", str(ROOT / "requirements-torch.txt")], check=True, env=INHERITED)
        server = ThreadingHTTPServer((gateway, 0), partial(_Quiet, directory=str(index)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://{gateway}:{server.server_port}/"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing of each request."""


@contextmanager
def engine() -> Iterator[Engine]:
    """Raises `NoEngine`."""
    place = Path(tempfile.mkdtemp(prefix="flowpp-docker-"))
    try:
        found = Engine(place)
        if found.docker("info", check=False).returncode == 0:
            yield found
        else:
            with _started(place) as host:
                yield Engine(place, host)
    finally:
        shutil.rmtree(place)


@contextmanager
def _started(place: Path) -> Iterator[str]:
    """The address of an engine whose images, containers and volumes are all in `place`."""
    if os.getuid() or not shutil.which("dockerd") or not shutil.which("debootstrap"):
        raise NoEngine("no Docker engine answers; as root, with Debian's docker.io and debootstrap, one is started")
    host = f"unix://{place}/engine.sock"
    options = ["--data-root", place / "data", "--exec-root", place / "run", "--pidfile", place / "pid", "--host", host]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(["dockerd", *map(str, options)], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while Engine(place, host).docker("info", check=False).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise NoEngine((place / "log").read_text()[-3000:])
            time.sleep(0.5)
        yield host
    finally:
        process.terminate()
        process.wait(60)
