"""Backups: what is in the store is in the backup, and nothing else, whatever happens meanwhile."""

from pathlib import Path

import pytest

from tests.s3 import S3
from worker.artifacts import ArtifactStore
from worker.backup import back_up
from worker.refusals import Conflict


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A job with a record and files, a dataset and a key."""
    (tmp_path / "files" / "inner").mkdir(parents=True)
    (tmp_path / "files" / "inner" / "a.txt").write_text("a")
    (tmp_path / "files" / "b.txt").write_text("b")
    store = ArtifactStore(str(tmp_path / "store"))
    store.put("jobs/job_1/attempt-1-last", tmp_path / "files")
    store.put_record("jobs/job_1/record-100", {"as of": 100})
    store.put("datasets/ds_1", tmp_path / "files", {"id": "ds_1"})
    store.put_record("keys/key_1", {"id": "key_1"})
    return store


@pytest.fixture
def backup(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "backup"))


def content(store: ArtifactStore) -> dict[str, bytes]:
    assert store.directory is not None
    found = sorted(path for path in store.directory.rglob("*") if path.is_file())
    return {path.relative_to(store.directory).as_posix(): path.read_bytes() for path in found}


def test_a_backup_is_the_store_byte_for_byte_and_a_second_one_copies_nothing(
    store: ArtifactStore, backup: ArtifactStore
) -> None:
    done = back_up(store, backup)
    assert (done.copied, done.unchanged, done.deleted, done.damaged) == (4, 0, 0, [])
    assert content(backup) == content(store)
    again = back_up(store, backup)
    assert (again.copied, again.unchanged) == (0, 4)


def test_a_backup_may_be_in_a_bucket_and_comes_back_from_there(store: ArtifactStore, s3: S3, tmp_path: Path) -> None:
    bucket = ArtifactStore(s3.new_store())
    assert back_up(store, bucket).copied == 4
    assert back_up(store, bucket).unchanged == 4
    restored = ArtifactStore(str(tmp_path / "restored"))
    assert back_up(bucket, restored).copied == 4
    assert content(restored) == content(store)


def test_what_is_gone_from_the_store_goes_from_the_backup(store: ArtifactStore, backup: ArtifactStore) -> None:
    back_up(store, backup)
    store.delete("jobs/job_1")
    store.put_record("keys/key_1", {"id": "key_1", "changed": True})
    done = back_up(store, backup)
    assert (done.copied, done.unchanged, done.deleted) == (1, 1, 2)
    assert content(backup) == content(store)


def test_a_damaged_file_is_told_and_what_was_backed_up_of_it_stays(store: ArtifactStore, backup: ArtifactStore) -> None:
    back_up(store, backup)
    before = content(backup)
    assert store.directory is not None
    (store.directory / "datasets" / "ds_1" / "b.txt").write_text("B")
    assert back_up(store, backup).damaged == [], "what has not changed by its manifest is not read again"
    backup.delete("jobs")
    (store.directory / "jobs" / "job_1" / "attempt-1-last" / "b.txt").write_text("B")
    done = back_up(store, backup)
    assert [message.split()[0] for message in done.damaged] == ["jobs/job_1/attempt-1-last/b.txt"]
    kept = content(backup)
    assert kept["datasets/ds_1/b.txt"] == before["datasets/ds_1/b.txt"] == b"b"
    assert "jobs/job_1/record-100/manifest.json" in kept
    assert "jobs/job_1/attempt-1-last/manifest.json" not in kept, "it does not exist there"


def test_a_record_that_gives_way_to_a_newer_one_meanwhile_is_backed_up_as_the_newer(
    tmp_path: Path, store: ArtifactStore, backup: ArtifactStore
) -> None:
    class Busy(ArtifactStore):
        """Beside which a recorder works."""

        left = 3

        def replicate(self, prefix: str, other: ArtifactStore) -> bool:
            if prefix.startswith("jobs/job_1/record-") and self.left:
                self.left -= 1
                self.put_record(f"jobs/job_1/record-{200 - self.left}", {"as of": 200 - self.left})
                self.delete(prefix)
            return super().replicate(prefix, other)

    done = back_up(Busy(str(tmp_path / "store")), backup)
    assert content(backup) == content(store)
    assert backup.manifest("jobs/job_1/record-200").record == {"as of": 200}
    assert done.deleted == 0


def test_a_record_that_gives_way_to_a_newer_one_after_it_was_copied_stays(
    tmp_path: Path, store: ArtifactStore, backup: ArtifactStore
) -> None:
    class Busy(ArtifactStore):
        """Beside which a recorder works, a little later than the backup."""

        def replicate(self, prefix: str, other: ArtifactStore) -> bool:
            copied = super().replicate(prefix, other)
            if prefix == "jobs/job_1/record-100":
                self.put_record("jobs/job_1/record-200", {"as of": 200})
                self.delete(prefix)
            return copied

    assert back_up(Busy(str(tmp_path / "store")), backup).deleted == 0
    assert backup.manifest("jobs/job_1/record-100").record == {"as of": 100}, "else there were no record of the job"
    assert back_up(store, backup).deleted == 1
    assert content(backup) == content(store)


def test_an_empty_store_empties_no_backup(tmp_path: Path, store: ArtifactStore, backup: ArtifactStore) -> None:
    back_up(store, backup)
    with pytest.raises(Conflict, match="nothing in the store"):
        back_up(ArtifactStore(str(tmp_path / "another")), backup)
    assert content(backup) == content(store)


def test_a_manifest_alone_is_backed_up_and_goes_when_it_is_gone(store: ArtifactStore, backup: ArtifactStore) -> None:
    store.put_record("jobs/job_2/record-300.json", {"as of": 300})
    back_up(store, backup)
    assert backup.manifest("jobs/job_2/record-300.json").record == {"as of": 300}
    assert content(backup) == content(store)
    store.delete("jobs/job_2/record-300.json")
    assert back_up(store, backup).deleted == 1
    assert content(backup) == content(store)
