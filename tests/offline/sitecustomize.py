"""Refuse every connection that leaves this machine.

Python imports this file by itself when its folder is on PYTHONPATH. Refused addresses are also
added to the file SFTLAB_OFFLINE_LOG, so that an attempt shows even where a library swallows the
error.
"""
import os
import sys

HERE = {"localhost", "0.0.0.0", "::", "::1", "", None}


def is_local(host):
    if isinstance(host, bytes):
        host = host.decode()
    return host in HERE or host.startswith("127.")


def refuse(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]  # a tuple is an internet address
    else:
        return
    if is_local(host):
        return
    if log := os.environ.get("SFTLAB_OFFLINE_LOG"):
        with open(log, "a") as f:
            f.write(f"{host}\n")
    raise ConnectionRefusedError(f"this process may not use the network, and wanted {host!r}")


sys.addaudithook(refuse)
