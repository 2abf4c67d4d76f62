"""A stand-in for a container engine: a Dockerfile's instructions are done in an overlay of this machine's file system.

What base images hold is this machine's; all else is as the engine has it: instructions in their order, stages, the
context's .dockerignore, user, environment, a root file system that cannot be written, no capabilities. Mounts and
network are a namespace's own and go with it. Needs root.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OF_THE_MACHINE = ("PIP_", "UV_", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "SSL_CERT", "REQUESTS_CA")
"""What packages are fetched by."""


@dataclass
class Image:
    """Where a stage's file system is, and what its instructions have said."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    directory: str = "/"
    user: str = "0:0"
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Machine:
    """Namespaces of mounts and network that live as long as the process `pid`; file systems lie below `place`."""

    pid: int
    place: Path

    def run(
        self, *command: str, root: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """In this machine's network. Raises `CalledProcessError`, whose output is shown."""
        entered = self.inside(command, root, network=False)
        done = subprocess.run(entered, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
            done.check_returncode()
        return done

    def inside(self, command: Sequence[str], root: Path | None, network: bool = True) -> list[str]:
        """What runs it in the namespaces; that of the network has loopback alone."""
        entered = ["nsenter", "--target", str(self.pid), "--mount", *(["--net"] if network else [])]
        return [*entered, *(["chroot", str(root)] if root else []), *command]

    def overlay(self, name: str) -> Path:
        """This machine's file system, to be written to, with python where base images have it."""
        root = self.place / name / "root"
        for part in ("upper", "work", "root"):
            self.run("mkdir", "-p", str(self.place / name / part))
        layers = f"lowerdir=/,upperdir={self.place / name / 'upper'},workdir={self.place / name / 'work'}"
        self.run("mount", "-t", "overlay", "overlay", "-o", layers, str(root))
        for system in ("/proc", "/dev"):
            self.run("mount", "--bind", system, f"{root}{system}")
        python = Path(os.path.realpath(sys.executable))
        wrapper = f'#!/bin/sh\nexec {python} "$@"\n'  # a link would take this system's library for its own
        self.run("sh", "-c", 'printf %s "$0" > /usr/local/bin/python', wrapper, root=root)
        self.run("chmod", "755", "/usr/local/bin/python", root=root)
        for parent in python.parents:
            self.run("chmod", "a+x", str(parent), root=root)
        return root

    def build(self, dockerfile: Path, name: str) -> Image:
        """The last stage of it."""
        from dockerfile_parse import DockerfileParser  # which only `make test-images` installs

        stages: dict[str, Image] = {}
        image = Image(Path())
        with dockerfile.open("rb") as file:
            steps = DockerfileParser(fileobj=file).structure
        for step in steps:
            what, value = step["instruction"], step["value"]
            if what == "FROM":
                stage = value.split()[2] if " AS " in value else "last"
                image = stages[stage] = Image(self.overlay(f"{name}-{stage}"))
            elif what != "COMMENT":
                self._do(what, value, image, stages)
        return image

    def _do(self, what: str, value: str, image: Image, stages: Mapping[str, Image]) -> None:
        if what == "RUN":
            words = value.split()
            shell = " ".join(word for word in words if not word.startswith("--mount=type=cache"))
            machine = {name: text for name, text in os.environ.items() if name.startswith(_OF_THE_MACHINE)}
            entered = f"cd {image.directory} && {shell}"
            self.run("sh", "-c", entered, root=image.root, environment=machine | image.environment)
        elif what in ("ENV", "ARG"):
            for each in shlex.split(value):
                key, _, text = each.partition("=")
                image.environment[key] = text.replace("$PATH", image.environment["PATH"])
        elif what == "WORKDIR":
            image.directory = value
            self.run("mkdir", "-p", value, root=image.root)
        elif what == "COPY":
            self._copy(value, image, stages)
        elif what == "USER":
            image.user = value
        elif what == "CMD":
            image.command = json.loads(value)
        elif what == "HEALTHCHECK":
            image.health = json.loads(value[value.index("CMD") + 3 :])
        else:
            assert what == "EXPOSE", what

    def _copy(self, value: str, image: Image, stages: Mapping[str, Image]) -> None:
        *sources, target = value.split()
        start = ROOT
        if sources[0].startswith("--from="):
            start = stages[sources.pop(0).partition("=")[2]].root
        else:
            admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
            assert all(any(fnmatch(source, pattern) for pattern in admitted) for source in sources), sources
        to = f"{image.root}{os.path.normpath(os.path.join(image.directory, target))}"
        for source in sources:
            of = f"{start}/{source.lstrip('/')}"
            self.run("mkdir", "-p", os.path.dirname(to))
            into = target.endswith("/") and not os.path.isdir(of)
            self.run("cp", "-a", *([] if into else ["-T"]), of, f"{to}/" if into else to)


@contextmanager
def machine(place: Path) -> Iterator[Machine]:
    """File systems in memory below `place`."""
    assert os.geteuid() == 0, "make test-images needs root: it mounts file systems in a namespace of its own"
    for tool in ("unshare", "nsenter", "setpriv", "ip"):
        assert shutil.which(tool), f"there is no {tool}; install util-linux and iproute2"
    with subprocess.Popen(["unshare", "--mount", "--net", "sleep", "infinity"]) as holder:
        try:
            here = Machine(holder.pid, place)
            while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
                pass
            here.run("mount", "-t", "tmpfs", "-o", "size=12g", "tmpfs", str(place))
            subprocess.run(here.inside(["ip", "link", "set", "lo", "up"], None), check=True)
            yield here
        finally:
            holder.send_signal(signal.SIGKILL)
