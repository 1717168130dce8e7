"""Whether the hub can be asked at all, found out once and quickly."""

from __future__ import annotations

import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

SECONDS = 5.0  # for a connection; the hub's own client tries for over a minute for each file


def ask_hub_or_cache(path: str) -> None:
    """Before the files of `path` are looked for: where it is no folder and the hub cannot be reached, use the cache alone.

    It is the same as HF_HUB_OFFLINE=1, for the rest of this process. A folder's name with a slip of the pen in it looks like
    a repo of the hub; on a machine without a network it took 70 s to say so.
    """
    if not constants.HF_HUB_OFFLINE and not Path(path).exists() and not _reachable():
        constants.HF_HUB_OFFLINE = True


@lru_cache(maxsize=1)
def _reachable() -> bool:
    """Whether the host of the hub, HF_ENDPOINT, takes a connection; behind a proxy nothing can be said, and it is taken to."""
    address = urlsplit(constants.ENDPOINT)
    host, port = address.hostname or "", address.port or (80 if address.scheme == "http" else 443)
    if {address.scheme, "all"} & getproxies().keys() and not proxy_bypass(host):
        return True
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
