"""Where webhooks may point: http and https at public addresses, and into the private networks that settings allow.

Whoever makes a webhook lets this service connect to where it cannot itself; so a name's addresses are checked, all of
them, each time it is resolved, and the connection is made to an address that was checked.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from typing import TypeAlias

import httpx

from worker.refusals import Invalid

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve: TypeAlias = Callable[[str], Sequence[str]]
"""The addresses of a name. Raises `OSError`."""

_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,45}")  # a name or IPv4 address, or an IPv6 one

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_TRANSITION = (  # they lead to an IPv4 address that they contain, or that whoever relays chooses
    ipaddress.IPv6Network("2001::/32"),
    ipaddress.IPv6Network("2002::/16"),
    ipaddress.IPv4Network("192.88.99.0/24"),
)


def parse(url: str) -> httpx.URL:
    """Raises `Invalid` for what no webhook's URL can be."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise _invalid(f"this is no URL: {error}") from error
    host = parsed.raw_host.decode("ascii")  # `parsed.host` decodes IDNA, and raises for a malformed xn-- label
    if parsed.scheme not in ("http", "https") or not host:
        raise _invalid("write a whole URL, which begins with https:// or http:// and a host")
    if parsed.userinfo:
        raise _invalid("the URL may hold no user and password; a receiver knows us by the signature")
    if "#" in url:
        raise _invalid("the URL may have no fragment (#...), which is never sent")
    if parsed.port is not None and not 1 <= parsed.port <= 65_535:
        raise _invalid(f"{parsed.port} is no port; ports are from 1 to 65535")
    if not _HOST.fullmatch(host):
        raise _invalid(f"{host[:255]!r} is no host")
    return parsed


class Addresses:
    """Those that webhooks may have: public ones, and those of the networks `allowed`."""

    def __init__(self, allowed: Sequence[Network] = (), resolve: Resolve | None = None) -> None:
        self._allowed = tuple(allowed)
        self._resolve = resolve or _resolve

    def of(self, url: httpx.URL) -> list[Address]:
        """Of the URL's host; takes as long as its name takes to resolve.

        Raises `Invalid`: `unresolvable_host`, and `private_address` if any of them may not be connected to.
        """
        host = url.raw_host.decode("ascii")
        try:
            found = [ipaddress.ip_address(text.partition("%")[0]) for text in self._resolve(host)]
        except (OSError, UnicodeError) as error:
            raise Invalid("unresolvable_host", f"the host {host[:255]} has no address: {error}", "url") from error
        if not found or not all(self.admits(address) for address in found):
            raise Invalid(
                "private_address",
                f"the host {host[:255]} is not at a public address, and webhooks may only point to these; who runs the "
                "service may allow private networks by FLOWPP_WEBHOOK_NETWORKS",
                "url",
            )
        return list(dict.fromkeys(found))

    def admits(self, address: Address) -> bool:
        """Whether webhooks may be sent to it."""
        address = _embedded(address)
        if any(address in network for network in self._allowed):
            return True
        if any(address in network for network in _TRANSITION):
            return False
        if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_UNICAST:
            return False
        return address.is_global and not address.is_multicast


def _embedded(address: Address) -> Address:
    """The IPv4 address that a mapped or translated one (NAT64) leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address


def _resolve(host: str) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _invalid(message: str) -> Invalid:
    return Invalid("invalid_url", message, "url")
