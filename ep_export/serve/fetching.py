"""A picture from another machine, on behalf of somebody who may not be trusted with this network.

A name is resolved here, once; every address it has must be a public one, and the connection goes to the
address that was checked, so that a name cannot mean something else a moment later. Redirections go the same
way. Bytes are counted as they come.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import anyio
import httpx2

import ep_export
from ep_export.serve.api_error import ApiError
from ep_export.serve.limits import Limits

__all__ = ["Address", "fetch", "is_public"]

Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"

_REDIRECTIONS = 3
_PORTS = {"http": 80, "https": 443}


def is_public(address: Address) -> bool:
    """Whether an address is one of the internet's, also when it hides in an IPv6 one."""
    if isinstance(address, ipaddress.IPv6Address):
        hidden = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64:
            hidden = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if hidden is not None:
            return is_public(hidden)
    return address.is_global and not address.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


async def resolve(host: str, port: int) -> list[Address]:
    """Every address of a name.

    Raises:
        OSError: It has none.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


async def fetch(
    url: str,
    limits: Limits,
    *,
    param: str,
    resolving: Callable[[str, int], Awaitable[list[Address]]] = resolve,
    permitted: Callable[[Address], bool] = is_public,
) -> bytes:
    """The bytes of a picture.

    Args:
        url: http or https.
        limits: Bytes and seconds.
        param: Which field of the request names it.
        resolving: Name and port -> addresses.
        permitted: Which addresses may be spoken to.

    Raises:
        ApiError: Not reachable, not permitted, too large, too slow, or no picture by its type.
    """
    try:
        with anyio.fail_after(limits.fetch_seconds):
            return await _follow(url, limits, resolving, permitted)
    except TimeoutError:
        told = f"the picture did not come within {limits.fetch_seconds:g} seconds"
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, UnicodeError) as error:
        told = f"the picture could not be fetched: {type(error).__name__}"  # no more: this network is private
    except _RefusedError as error:
        told = str(error)
    raise ApiError(400, told, param=param, code="fetch_failed")


class _RefusedError(Exception):
    """A reason that the asking side may know."""


async def _follow(
    url: str,
    limits: Limits,
    resolving: Callable[[str, int], Awaitable[list[Address]]],
    permitted: Callable[[Address], bool],
) -> bytes:
    place = httpx2.URL(url)
    # Proxies and passwords of this machine's environment are not the asking side's to use.
    async with httpx2.AsyncClient(trust_env=False, timeout=limits.fetch_seconds) as client:
        for _ in range(1 + _REDIRECTIONS):
            port = place.port or _PORTS.get(place.scheme, 0)
            if not port or not place.host or place.userinfo:
                raise _RefusedError(
                    "a picture's address is http or https, with a host and without a password"
                )
            addresses = await resolving(place.host, port)
            if not addresses or not all(map(permitted, addresses)):
                raise _RefusedError("a picture's address leads into a private network")
            request = client.build_request(
                "GET",
                place.copy_with(host=str(addresses[0])),
                headers={
                    "Host": place.netloc.decode("ascii"),
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": f"ep-export/{ep_export.__version__}",
                },
                extensions={"sni_hostname": place.raw_host.decode("ascii")},
            )
            response = await client.send(request, stream=True)
            try:
                if not response.has_redirect_location:
                    return await _body(response, limits.fetch_bytes)
                place = place.join(response.headers["location"])
            finally:
                await response.aclose()
    raise _RefusedError(f"the picture's address redirects more than {_REDIRECTIONS} times")


async def _body(response: httpx2.Response, most: int) -> bytes:
    if response.status_code != httpx2.codes.OK:
        raise _RefusedError(f"the picture's address answers with {response.status_code}")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.startswith("image/"):
        raise _RefusedError(
            f"the picture's address holds {kind[:50] or 'something untyped'}, expected image/*"
        )
    data = bytearray()
    async for block in response.aiter_raw():
        data += block
        if len(data) > most:
            raise _RefusedError(f"the picture has more than {most} bytes")
    return bytes(data)
