"""Where a page can be listened at: which addresses are this machine's alone, and which port is free."""

from __future__ import annotations

import errno
import os
import socket

from graf.base.errors import UserError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
#: ports that are tried, the one that was asked for and those after it
PORTS = 100
LAST_PORT = 65535


def find_port(host: str, port: int) -> int:
    """The first port from `port` on that can be listened at.

    viser looks for one too, but waits without end where there is none. Raises UserError where the host is no address of
    this machine, and where every port is taken.
    """
    for candidate in range(port, min(port + PORTS, LAST_PORT + 1)):
        try:
            _listen(host, candidate)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(f"--host {host}: cannot listen there ({error.strerror or error})") from error
            refusal = error
        else:
            return candidate
    raise UserError(
        f"--host {host} --port {port}: neither it nor a port after it can be listened at ({refusal.strerror}); choose "
        "another --port"
    ) from refusal


def _listen(host: str, port: int) -> None:
    """Bind to every address of a host for a moment. Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":  # else what is left of a connection that was closed keeps the port for a minute
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
            probe.listen(1)
