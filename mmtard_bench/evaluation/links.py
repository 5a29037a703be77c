"""Connections between the processes of a run: how they find each other, lines of JSON after."""

import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import timedelta
from typing import Any

PATIENCE = 600.0
"""Seconds that processes wait for each other to start."""

_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 20, "TCP_KEEPCNT": 6}


class Link:
    """A connection to another process: a line of JSON a message, a kind and a body."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that lost its power closes nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8", newline="\n")
        self._sending = threading.Lock()

    def send(self, kind: str, body: object) -> None:
        """Send a message. Whether the other process is gone is for its listener to say."""
        line = json.dumps([kind, body]) + "\n"
        with self._sending, suppress(OSError):
            self._connection.sendall(line.encode())

    def messages(self) -> Iterator[tuple[str, Any]]:
        """What the other process sends, until it ends."""
        for line in self._lines:
            kind, body = json.loads(line)
            yield kind, body

    def greeting(self, seconds: float) -> tuple[str, Any]:
        """The first message. Raises OSError or ValueError if none comes, or no sensible one."""
        self._connection.settimeout(seconds)
        kind, body = json.loads(self._lines.readline(1000))
        self._connection.settimeout(None)
        return kind, body

    def close(self) -> None:
        """End the connection."""
        self._lines.close()
        self._connection.close()


def meet(rank: int, world: int, host: str, port: int) -> dict[int, Link]:
    """The links of a process, by rank: to all others for the first, to the first for others.

    ``host`` and ``port`` are those of torch's key-value store, on the machine of the first process.
    Raises OSError, RuntimeError (torch's) or ValueError if they do not come together.
    """
    deadline = time.monotonic() + PATIENCE
    # Under torchrun the store is its agent's and outlives a restart of the processes.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = _store(host, port, serve=rank == 0 and not agent, deadline=deadline)
    key = f"mmtard-bench/{attempt}"
    if rank > 0:
        while not store.check([key]):
            _require_time(deadline)
            time.sleep(0.05)
        where, secret = json.loads(store.get(key))
        link = Link(socket.create_connection((host, where), timeout=60))
        link.send(secret, rank)
        # All wait for the slowest, and the store must live until the last one has come.
        link.greeting(max(deadline - time.monotonic(), 1))
        return {0: link}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with closing(
        socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world)
    ) as server:
        secret = secrets.token_hex()
        store.set(key, json.dumps([server.getsockname()[1], secret]))
        links = _welcome(server, world, secret, deadline)
    for link in links.values():
        link.send("welcome", None)
    return links


def _welcome(server: socket.socket, world: int, secret: str, deadline: float) -> dict[int, Link]:
    links: dict[int, Link] = {}
    while len(links) < world - 1:
        _require_time(deadline, f"{len(links) + 1} of {world} came")
        server.settimeout(1)
        with suppress(TimeoutError):
            link = Link(server.accept()[0])
            try:
                said, rank = link.greeting(10)
            except (OSError, ValueError):
                link.close()
                continue
            if secrets.compare_digest(str(said), secret) and rank in range(1, world):
                links[rank] = link
            else:
                link.close()
    return links


def _store(host: str, port: int, *, serve: bool, deadline: float) -> Any:
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    while True:
        try:
            # In short tries: while torch waits it hears no signal.
            wait = timedelta(seconds=5)
            return TCPStore(host, port, is_master=serve, timeout=wait, wait_for_workers=False)
        except DistError:
            if serve or time.monotonic() > deadline:
                raise


def _require_time(deadline: float, text: str = "the first did not come") -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{text} within {PATIENCE:.0f} s")
