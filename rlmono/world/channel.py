"""Sockets: a device rank and its node's host over a unix socket; hosts among each other over TCP with CURVE.

The unix socket lies in a private folder (mode 0700) that the host makes and names through the store. Between hosts,
each makes a CURVE key pair at start and publishes only the public key: the controller's socket lets in just the keys
that it read from the store, and a host connects to just the controller's key. Strangers are refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import Callable, Optional

import zmq
import zmq.asyncio
from torch.distributed import Store
from zmq.auth.asyncio import AsyncioAuthenticator

from rlmono.world import messages
from rlmono.world.locks import InUse, hold
from rlmono.world.store import Deadline, store_get

log = logging.getLogger(__name__)
_ZAP_DOMAIN = "rlmono"
_NOW, _NOW_AND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)       # pyzmq's enums are slow
_EVENTS, _READABLE = int(zmq.EVENTS), int(zmq.POLLIN)
_send, _receive, _get = zmq.backend.Socket.send, zmq.backend.Socket.recv, zmq.backend.Socket.get        # without what pyzmq puts around them
_AT_ONCE, _MUCH = 64, 64 << 10
"""Messages in a turn of the loop, and the bytes after which no more are read in it: what came first is finished before the next is begun, else
all would be finished as late as the last."""
HEARTBEAT_S = 2.0
"""From one heartbeat to the next, between hosts and from an engine that serves to its host."""


class PrivateFolder:
    """A folder for sockets that only this user can enter; its path is short, as unix sockets ask. Removed by `close`,
    or by the next run where this process was killed: it is locked for as long as its owner lives."""

    def __init__(self, attempt: str):
        tmp = Path(_short_tmp())
        _sweep(tmp)
        fresh = Path(tempfile.mkdtemp(prefix=".rlmono-", dir=tmp))      # mode 0700; swept by nobody until it is locked
        self._lock = hold(fresh)
        self.path = fresh.rename(tmp / f"rlmono-{attempt[:6]}{fresh.name.removeprefix('.rlmono')}")

    @property
    def address(self) -> str:
        return f"ipc://{self.path}/host"

    def close(self) -> None:
        _remove(self.path)
        os.close(self._lock)


def _sweep(tmp: Path) -> None:
    """Remove what runs of this user that were killed have left."""
    for left in tmp.glob("rlmono-??????-*"):
        try:
            if not left.is_dir() or left.stat().st_uid != os.getuid():
                continue
            lock = hold(left)
        except (InUse, OSError):        # its run is alive, or another process has just removed it
            continue
        _remove(left)
        os.close(lock)


def _remove(folder: Path) -> None:
    """Nothing but what a run puts there: an empty folder, or one with a socket."""
    address = folder / "host"
    try:
        if address.is_socket():
            address.unlink()
        folder.rmdir()
    except OSError as e:
        log.warning("%s is left behind: %s", folder, e)


def _short_tmp() -> str:
    tmp = tempfile.gettempdir()
    return tmp if len(tmp) < 60 else "/tmp"     # sun_path holds 107 bytes


class HostLink:
    """A device rank's end of the socket to its host. Used by one thread; `socket` may be polled by others' loops.

    A second one, for a thread that reports only, has a `name`.
    """

    def __init__(self, address: str, rank: int, name: str = ""):
        self.rank = rank
        self._context = zmq.Context(1)
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, f"{rank}/{name}".rstrip("/").encode())
        self.socket.setsockopt(zmq.LINGER, 2000)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self.socket.connect(address)

    def send(self, message: messages.Message) -> None:
        self.socket.send(messages.encode(message))

    def receive_now(self) -> Optional[messages.Message]:
        """A message that has already come, or None."""
        try:
            return messages.decode(self.socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def receive(self, timeout_s: float, what: str) -> messages.Message:
        """The next message; raises TimeoutError that says what this rank waited for."""
        if not self.socket.poll(int(timeout_s * 1000)):
            raise TimeoutError(f"rank {self.rank} waits for {what}: nothing within {timeout_s:g} s")
        return messages.decode(self.socket.recv())

    def report(self, kind: str, rollout_id: int, **data: object) -> None:
        self.send(messages.Report(kind, rollout_id, dict(data)))

    def close(self) -> None:
        self.socket.close()
        self._context.term()


class DeviceSocket:
    """A host's end for its device ranks: ROUTER; a rank's identity is its number (`3/name` that of a link besides).

    Not one of pyzmq's asyncio sockets, which take several futures and turns of the loop for every message: a send is one call, and all that
    has come is handed over in one turn. Used on one event loop.
    """

    def __init__(self, context: zmq.asyncio.Context, address: str):
        self._socket: zmq.Socket[bytes] = zmq.Socket(context, zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.bind(address)
        self._take: Optional[Callable[[int, bytes], None]] = None
        self._failed: asyncio.Future[None]
        self._reads_soon = False

    def send(self, rank: int, payload: bytes) -> None:
        """At once: ZMQ's queues are unbounded, and drop what is for a peer that is not there."""
        _send(self._socket, b"%d" % rank, _NOW_AND_MORE)
        _send(self._socket, payload, _NOW)
        # ZMQ's file descriptor tells of what has come only once, and a send may take it.
        if self._take is not None and _get(self._socket, _EVENTS) & _READABLE:       # type: ignore[operator]
            self._read_soon()

    async def serve(self, take: Callable[[int, bytes], None]) -> None:
        """For ever: `take(rank, payload)` for every message. Raises what it raises."""
        loop = asyncio.get_running_loop()
        self._take, self._failed, descriptor = take, loop.create_future(), self._socket.FD
        loop.add_reader(descriptor, self._read)
        try:
            self._read()
            await self._failed
        finally:
            self._take = None
            loop.remove_reader(descriptor)

    def _read_soon(self) -> None:
        if not self._reads_soon:
            self._reads_soon = True
            asyncio.get_running_loop().call_soon(self._read)

    def _read(self) -> None:
        self._reads_soon = False
        try:
            size = 0
            for _ in range(_AT_ONCE):
                if self._take is None:
                    return
                if size > _MUCH:
                    break
                if not _get(self._socket, _EVENTS) & _READABLE:        # type: ignore[operator]
                    return
                identity, payload = _receive(self._socket, _NOW), _receive(self._socket, _NOW)      # a message's parts come together
                size += len(payload)
                self._take(int(identity.partition(b"/")[0]), payload)
            self._read_soon()           # others come first
        except Exception as e:
            self._take = None
            if not self._failed.done():
                self._failed.set_exception(e)

    def close(self) -> None:
        self._socket.close()


class HostMesh:
    """CURVE TCP between the controller (rank `hosts[0]`) and the other hosts. Built by `open_mesh`."""

    def __init__(self, sock: zmq.asyncio.Socket, auth: Optional[AsyncioAuthenticator]):
        self.socket, self._auth = sock, auth

    def close(self) -> None:
        if self._auth is not None:
            self._auth.stop()
        self.socket.close()


def open_mesh(context: zmq.asyncio.Context, store: Store, rank: int, hosts: tuple[int, ...], master_addr: str, timeout_s: float) -> HostMesh:
    """Exchange public keys through the store and connect. On the controller the socket is a ROUTER whose peers are
    named by their rank; on others a DEALER to the controller. Call it from a running asyncio loop."""
    public, secret = zmq.curve_keypair()
    store.set(f"host/{rank}/key", public.decode())
    if rank == hosts[0]:
        return _open_controller(context, store, rank, hosts, master_addr, (public, secret), timeout_s)
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.IDENTITY, str(rank).encode())
    sock.curve_publickey, sock.curve_secretkey = public, secret
    sock.curve_serverkey = store_get(store, f"host/{hosts[0]}/key", timeout_s, "the controller").encode()
    _keep_alive(sock)
    sock.connect(store_get(store, "controller/address", timeout_s, "the controller"))
    return HostMesh(sock, None)


def _open_controller(context: zmq.asyncio.Context, store: Store, rank: int, hosts: tuple[int, ...], master_addr: str,
                     keys: tuple[bytes, bytes], timeout_s: float) -> HostMesh:
    deadline = Deadline(timeout_s, "the controller waits for the other hosts' keys")
    peers = [store_get(store, f"host/{h}/key", deadline.left(), f"host rank {h}").encode() for h in hosts if h != rank]
    auth = AsyncioAuthenticator(context)
    auth.start()
    auth.configure_curve_callback(domain=_ZAP_DOMAIN, credentials_provider=_Allowed(peers))
    sock = context.socket(zmq.ROUTER)
    sock.curve_publickey, sock.curve_secretkey, sock.curve_server = *keys, True
    sock.zap_domain = _ZAP_DOMAIN.encode()
    sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
    _keep_alive(sock)
    port = sock.bind_to_random_port(f"tcp://{_interface(master_addr)}")
    store.set("controller/address", f"tcp://{master_addr}:{port}")
    return HostMesh(sock, auth)


def _interface(master_addr: str) -> str:
    """The address by which the other nodes know this one, not every interface; except where a node's own name leads
    back to itself only (Debian's 127.0.1.1)."""
    address = socket.gethostbyname(master_addr)
    itself_only = address.startswith("127.") and master_addr not in (address, "localhost")
    return "*" if itself_only else address


class _Allowed:
    """pyzmq's credentials provider: just these public keys."""

    def __init__(self, keys: list[bytes]):
        self._keys = set(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        """`key` comes in Z85, as `curve_keypair` writes it."""
        return key in self._keys


def _keep_alive(sock: zmq.asyncio.Socket) -> None:
    sock.setsockopt(zmq.LINGER, 2000)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
