"""API keys: made, recognized, revoked; their secrets are kept nowhere."""

from pathlib import Path

import pytest

from worker.keys import Caller, NewKey, Quota, caller_of, id_of, record_key
from worker.refusals import NotFound, OverQuota
from worker.service import Service


def recognized(service: Service, token: str) -> Caller | None:
    key_id = id_of(token)
    return None if key_id is None else caller_of(token, service.redis.get(record_key(key_id)))


def test_a_token_is_recognized_as_its_key(service: Service) -> None:
    key, token = service.keys.create(NewKey(owner="alice", scopes=("read",), quota=Quota(max_jobs=3)))
    caller = recognized(service, token)
    assert caller is not None
    assert (caller.owner, caller.scopes, caller.key, caller.quota.max_jobs) == ("alice", {"read"}, key.id, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token[:-1] + ("a" if token[-1] != "a" else "b"),
        lambda token: token + "a",
        lambda token: token.replace("flowpp_", "flowpp_0", 1)[:-1],
        lambda token: token.rpartition("_")[0],
        lambda token: "",
        lambda token: "flowpp__",
        lambda token: f"flowpp_{'0' * 24}_secret",
    ],
)
def test_any_other_token_is_not(service: Service, change) -> None:
    _, token = service.keys.create(NewKey(owner="alice"))
    assert recognized(service, change(token)) is None


def test_a_revoked_key_opens_nothing(service: Service) -> None:
    key, token = service.keys.create(NewKey(owner="alice"))
    service.keys.revoke(key.id)
    assert recognized(service, token) is None
    assert service.keys.page().data == []
    with pytest.raises(NotFound, match="there is no key"):
        service.keys.revoke(key.id)


def test_no_secret_is_in_redis_or_in_the_store(service: Service) -> None:
    _, token = service.keys.create(NewKey(owner="alice"))
    secret = token.split("_", 2)[2]
    kept = [service.redis.get(key) for key in service.redis.keys("flowpp:key:*")]
    kept += [path.read_text() for path in Path(service.settings.store_url).rglob("*.json")]
    assert len(kept) == 2
    assert not [text for text in kept if secret in text]


@pytest.mark.parametrize(
    ("scopes", "may"),
    [
        ({"read"}, {"read"}),
        ({"submit"}, {"read", "submit"}),
        ({"admin"}, {"read", "submit", "admin"}),
    ],
)
def test_scopes(scopes: set[str], may: set[str]) -> None:
    caller = Caller("alice", frozenset(scopes))
    assert {scope for scope in ("read", "submit", "admin") if caller.may(scope)} == may
    assert caller.sees == (None if "admin" in scopes else "alice")


def test_an_owner_may_store_so_many_bytes(service: Service, dataset) -> None:
    service.check_bytes(Caller("local", quota=Quota(max_bytes=dataset.bytes + 1)))
    with pytest.raises(OverQuota, match="delete datasets or checkpoints first"):
        service.check_bytes(Caller("local", quota=Quota(max_bytes=dataset.bytes)))
    service.check_bytes(Caller("alice", quota=Quota(max_bytes=1)))
    service.datasets.delete(dataset.id)
    service.check_bytes(Caller("local", quota=Quota(max_bytes=1)))
