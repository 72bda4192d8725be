"""With this folder on PYTHONPATH, Python and its children reach no machine but their own."""

import errno
import os
import socket
import sys

OWN = ("127.0.0.1", "::1", "localhost", "", None)
NAME_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def refuse_other_machines(event: str, arguments: tuple) -> None:
    if event in NAME_LOOKUPS:
        host = arguments[0]
        if isinstance(host, bytes):
            host = host.decode()
        if host not in (*OWN, socket.gethostname()):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    elif event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if isinstance(address, tuple) and address[0] not in OWN:  # else a Unix socket
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


sys.addaudithook(refuse_other_machines)
