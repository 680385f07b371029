"""The network interface on which other hosts reach this one.

Gloo takes the address that this host's name stands for. Where that is the loopback's, as in Debian's /etc/hosts and in
many containers, no other host could connect to it.
"""

import fcntl
import socket
import struct

from tutel import env

_SIOCGIFADDR = 0x8915


def tell_gloo() -> None:
    """Name the interface for Gloo if the processes are on several hosts, it needs that, and nobody has named one."""
    launched = env.launch()
    if launched.local_size < launched.world_size:
        place = env.meeting()
        if (name := for_other_hosts(place.host, place.port)) is not None:
            env.default_gloo_interface(name)


def for_other_hosts(other: str, port: int) -> str | None:
    """Return the name of the interface to tell Gloo, or None if it finds one by itself, or there is none to find.

    Args:
        other: Name or IPv4 address of one of the hosts, which may be this one.
        port: Any port of it: nothing is sent.
    """
    try:
        if not socket.gethostbyname(socket.gethostname()).startswith("127."):
            return None
    except OSError:
        pass  # the name stands for nothing: Gloo would take the loopback too
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((other, port))
            here = probe.getsockname()[0]
    except OSError:
        return None
    return None if here.startswith("127.") else next((name for name in _names() if _address(name) == here), None)


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address(name: str) -> str | None:
    """Return the IPv4 address of an interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])
