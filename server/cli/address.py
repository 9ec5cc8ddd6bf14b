"""Where a server listens, and what to call that."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from quant.errors import ConfigError

BACKLOG = 2048


@dataclass(frozen=True)
class Address:
    """A socket that is bound, and the host and port asked for, for errors."""

    socket: socket.socket
    asked_for: str

    def listen(self) -> None:
        """Accept connections from now on. Raises ConfigError where another process does meanwhile."""
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            raise _refused(self.asked_for, error) from None

    @property
    def url(self) -> str:
        """What a client on this machine can use."""
        host, port = self.socket.getsockname()[:2]
        if host == "0.0.0.0" or (host == "::" and self._takes_ipv4):
            host = "127.0.0.1"  # an address that means all of them is none that a client can use
        elif host == "::":
            host = "::1"
        return f"http://{_bracketed(host)}:{port}"

    def __str__(self) -> str:
        host, port = self.socket.getsockname()[:2]
        if host not in ("0.0.0.0", "::"):
            return self.url
        kinds = "IPv4" if host == "0.0.0.0" else "IPv6 and IPv4" if self._takes_ipv4 else "IPv6"
        return f"{_bracketed(host)}:{port}, every {kinds} address of this machine (here: {self.url}),"

    @property
    def _takes_ipv4(self) -> bool:
        return not self.socket.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)


def bind(host: str, port: int) -> Address:
    """Take an address, without listening yet. `::` means IPv4 too, where the system can do that.

    Raises ConfigError where it cannot be had.
    """
    asked_for = f"{_bracketed(host)}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol: asyncio sends small pieces at once on sockets that are known to be TCP's.
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                takes_ipv4 = address[0] == "::" and socket.has_dualstack_ipv6()
                taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not takes_ipv4)
            taken.bind(address)
        except BaseException:
            taken.close()
            raise
    except (OSError, UnicodeError) as error:  # names that cannot be encoded are none
        raise _refused(asked_for, error) from None
    return Address(taken, asked_for)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _refused(asked_for: str, error: OSError | UnicodeError) -> ConfigError:
    if isinstance(error, socket.gaierror) or not isinstance(error, OSError):
        why = getattr(error, "strerror", None) or str(error)  # getaddrinfo has numbers of its own
    else:
        why = os.strerror(error.errno or 0)
    return ConfigError(f"cannot listen on {asked_for}: {why}; choose another --host or --port")
