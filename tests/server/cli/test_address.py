"""Where a server listens, as it says it and as clients reach it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from quant.errors import ConfigError
from server.cli.address import bind

needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")


def port_of(address: socket.socket) -> int:
    return int(address.getsockname()[1])


def connects(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as client:
        client.settimeout(10)
        return client.connect_ex((host, port)) == 0


def test_an_address_is_its_url() -> None:
    address = bind("127.0.0.1", 0)
    with address.socket as taken:
        assert str(address) == address.url == f"http://127.0.0.1:{port_of(taken)}"


@needs_ipv6
def test_ipv6_stands_in_brackets() -> None:
    address = bind("::1", 0)
    with address.socket as taken:
        assert str(address) == address.url == f"http://[::1]:{port_of(taken)}"


def test_all_addresses_are_named_and_the_url_to_use_beside_them() -> None:
    address = bind("0.0.0.0", 0)
    with address.socket as taken:
        port = port_of(taken)
        assert address.url == f"http://127.0.0.1:{port}"
        expected = f"0.0.0.0:{port}, every IPv4 address of this machine (here: http://127.0.0.1:{port}),"
        assert str(address) == expected


@needs_ipv6
def test_all_addresses_of_ipv6_are_those_of_ipv4_too() -> None:
    address = bind("::", 0)
    with address.socket as taken:
        port = port_of(taken)
        address.listen()
        assert connects("::1", port)
        assert connects("127.0.0.1", port)
        assert address.url == f"http://127.0.0.1:{port}"
        assert f"[::]:{port}, every IPv6 and IPv4 address" in str(address)


def test_nobody_connects_before_the_server_listens() -> None:
    address = bind("127.0.0.1", 0)
    with address.socket as taken:
        assert not connects("127.0.0.1", port_of(taken))
        address.listen()
        assert connects("127.0.0.1", port_of(taken))


@pytest.mark.parametrize("host", ["name.invalid", "a..b", "203.0.113.7"])
def test_what_is_no_address_of_this_machine_is_said(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}:0: .*choose another --host or --port"):
        bind(host, 0)


def test_a_port_that_is_taken_is_said() -> None:
    with bind("127.0.0.1", 0).socket as first:
        first.listen()
        with pytest.raises(ConfigError, match="Address already in use"):
            bind("127.0.0.1", port_of(first))


def test_small_pieces_wait_for_no_acknowledgement() -> None:
    # Where the system holds them back, every other answer on a kept connection is 40 ms late.
    async def accepted() -> bool:
        made: asyncio.Future[asyncio.BaseTransport] = asyncio.get_running_loop().create_future()

        class Noted(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                made.set_result(transport)

        address = bind("127.0.0.1", 0)
        address.listen()
        async with await asyncio.get_running_loop().create_server(Noted, sock=address.socket):
            with socket.create_connection(address.socket.getsockname()):
                transport = await asyncio.wait_for(made, 20)
                found: socket.socket = transport.get_extra_info("socket")
                no_delay = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                transport.close()
        return bool(no_delay)

    assert asyncio.run(accepted())
