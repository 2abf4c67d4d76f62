"""Where webhooks may point."""

from ipaddress import ip_address, ip_network

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.addresses import Addresses, parse
from worker.refusals import Invalid

PUBLIC = ["93.184.215.14", "1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::1.1.1.1"]
PRIVATE = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.1",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1",
    "100::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:101:101::1",
    "fc00::1",
    "fd12:3456::1",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_admitted(address: str) -> None:
    assert Addresses().admits(ip_address(address))


@pytest.mark.parametrize("address", PRIVATE)
def test_others_are_not(address: str) -> None:
    assert not Addresses().admits(ip_address(address))


def test_a_network_that_the_settings_allow_is_admitted_and_no_other() -> None:
    addresses = Addresses([ip_network("10.1.0.0/16"), ip_network("fd00::/8")])
    for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd12::1", "1.1.1.1"):
        assert addresses.admits(ip_address(address)), address
    for address in ("10.2.0.1", "127.0.0.1", "fc00::1"):
        assert not addresses.admits(ip_address(address)), address


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "0"],
)
def test_no_way_to_write_a_private_address_passes(host: str) -> None:
    with pytest.raises(Invalid) as refused:
        Addresses().of(parse(f"http://{host}:8000/"))
    assert refused.value.code == "private_address"
    assert "127.0.0.1" not in str(refused.value).replace(host.strip("[]"), ""), "it tells what a name leads to"


def test_one_private_address_among_public_ones_is_enough_to_refuse() -> None:
    with pytest.raises(Invalid, match="not at a public address"):
        Addresses(resolve=lambda host: ["1.1.1.1", "10.0.0.1"]).of(parse("https://example.com"))
    assert Addresses(resolve=lambda host: ["1.1.1.1", "1.1.1.1"]).of(parse("https://example.com")) == [
        ip_address("1.1.1.1")
    ]


def test_a_name_without_an_address_is_refused() -> None:
    with pytest.raises(Invalid) as refused:
        Addresses().of(parse("https://nothing.invalid/hook"))
    assert refused.value.code == "unresolvable_host"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ftp://example.com", "https:// or http://"),
        ("file:///etc/passwd", "https:// or http://"),
        ("example.com/hook", "https:// or http://"),
        ("//example.com", "https:// or http://"),
        ("https://", "https:// or http://"),
        ("https://user:password@example.com", "user and password"),
        ("https://user@example.com", "user and password"),
        ("https://example.com/#part", "fragment"),
        ("https://example.com:0/", "0 is no port"),
        ("https://example.com:99999/", "99999 is no port"),
        ("https://exa mple.com/", "no host"),
        ("https://a\\b/", "no host"),
        ("https://[fe80::1%25eth0]/", "no host"),
        ("http://0177.0.0.1/", "no URL"),
        ("https://example.com/\r\nHost: a", "no URL"),
        ("https://[::1/", "no URL"),
    ],
)
def test_what_is_no_webhooks_url_is_refused_and_told_why(url: str, why: str) -> None:
    with pytest.raises(Invalid) as refused:
        parse(url)
    assert refused.value.code == "invalid_url"
    assert why in str(refused.value)
    assert "password@" not in str(refused.value)


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=60), st.text(alphabet="abc.:/[]@#?%0123-_\\é\x00 ", max_size=40))
def test_any_text_is_refused_in_words_or_can_be_sent_to(text: str, like_a_url: str) -> None:
    for url in (text, f"http://{text}", f"https://{like_a_url}"):
        try:
            parsed = parse(url)
            (address,) = Addresses(resolve=lambda host: host.encode("idna") and ["1.1.1.1"]).of(parsed)
        except Invalid:
            continue
        sent = httpx.Request("POST", parsed.copy_with(host=str(address)), headers={"Host": parsed.netloc.decode()})
        assert sent.url.host == "1.1.1.1"
