"""Whatever files are sent, the API answers 2xx or 4xx, in words, and is afterwards as it was."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.corpus import damaged, image_files, source_files
from tests.api.served import Served, serving
from worker.redis_server import RedisServer

CLIENTS = 3
MOST_GROWTH_BYTES = 100 * 2**20


@pytest.fixture
def served(redis_server: RedisServer, saved_model: Path, tmp_path: Path) -> Iterator[Served]:
    with serving(redis_server, saved_model, tmp_path) as served:
        yield served


class Sender:
    """Sends files to be scored, or as datasets, which are deleted again."""

    def __init__(self, http: httpx.Client, model: str) -> None:
        self._http, self._model = http, model
        self.answers: Counter[str] = Counter()

    def __call__(self, endpoint: str, name: str, content: bytes) -> None:
        http = self._http
        if endpoint == "datasets":
            answer = http.post("/v1/datasets", files={"file": (name, content)})
        else:
            answer = http.post("/v1/likelihood-jobs", data={"model": self._model}, files={"files": (name, content)})
        assert 200 <= answer.status_code < 500, (name, content, answer.text)
        if answer.is_success:
            self.answers[f"{endpoint} taken"] += 1
            if endpoint == "datasets":
                assert http.delete(f"/v1/datasets/{answer.json()['id']}").status_code == 204
        else:
            problem = answer.json()
            assert problem["detail"].isprintable(), problem
            self.answers[problem["code"]] += 1


def send_damaged(served: Served, count: int) -> Counter[str]:
    """Sends so many, and checks what the API is afterwards; how often it gave which answer."""
    images, sources = image_files(), source_files()
    headers = {"Authorization": f"Bearer {served.token}"}
    with httpx.Client(base_url=served.url, headers=headers, trust_env=False, timeout=60) as http:
        sender = Sender(http, served.ids["model"][0])
        for endpoint, files in (("likelihood-jobs", images), ("datasets", images | sources)):
            for name, content in files.items():
                sender(endpoint, name, content)
        memory, descriptors = served.process.memory_info().rss, served.process.num_fds()
        scored = (("likelihood-jobs", *file) for file in damaged(images, count // 2, seed=1))
        stored = (("datasets", *file) for file in damaged(images | sources | sources, count - count // 2, seed=2))
        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(sender, *each) for pair in zip(scored, stored, strict=True) for each in pair]:
                done.result()
    assert served.process.memory_info().rss < memory + MOST_GROWTH_BYTES
    assert served.process.num_fds() <= descriptors + 20
    assert [path for path in served.temporary.rglob("*") if path.is_file()] == []
    log = served.log.read_text()
    assert "Traceback" not in log
    assert "Warning" not in log
    return sender.answers


def test_some_damaged_files_are_taken_or_refused(served: Served) -> None:
    answers = send_damaged(served, 300)
    assert answers["likelihood-jobs taken"] > 10
    assert answers["datasets taken"] > 10
    assert len(answers) > 10, "kinds of answers"


@pytest.mark.contract
@pytest.mark.timeout(1_600)
def test_ten_thousand_damaged_files_are_taken_or_refused(served: Served) -> None:
    answers = send_damaged(served, 10_000)
    assert len(answers) > 15, "kinds of answers"
