"""Collectives between ranks of one host, through memory that they share; everything else goes through gloo.

gloo sends all that ranks exchange through the kernel's TCP stack and hands it to threads that compete with the training for
the same cores. Here a rank copies what it sends into a buffer that the others have mapped, and tells them with a message of a
few bytes; who waits copies it out. No thread, no byte through a socket: with two workers on two cores a step of the reference
workload takes a seventh less time (pipelines/benchmark/README.md).

    post   copy into an own buffer -> message (operation, buffer, offset, bytes) to each peer
    wait   message of each peer -> copy out of its buffer

A message says, too, which operations its sender has read since the last one: a buffer is free when all have read it.

Buffers are memory files without a name, handed over with their first message, and the sockets are abstract: nothing is left
on the host when processes die, however they do, and a rank whose peer has died is told at once.
"""

import contextlib
import math
import mmap
import os
import secrets
import select
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE = struct.Struct("<5q")  # operation, buffer, capacity, offset, bytes; then the operations that were read
OPERATION = struct.Struct("<q")
ALIGNMENT = 64
UNLIKE_CALLS = "the ranks do not make the same calls in the same order."
MAX_PENDING = 64  # operations that a rank has begun and not all have read: from here on the oldest is ended before another begins
LONGEST = MESSAGE.size + 2 * MAX_PENDING * OPERATION.size  # between two messages no more operations are ended than may be pending
DIRECT_RANKS, DIRECT_BYTES = 8, 1 << 16  # every rank reads every other's whole tensor to sum it: more go to gloo


class Section(NamedTuple):
    """So many elements of a type."""

    dtype: torch.dtype
    elements: int

    @property
    def nbytes(self) -> int:
        """Without what follows it up to the next one."""
        return self.dtype.itemsize * self.elements


def sections(message: Tensor, kinds: Sequence[Section]) -> list[Tensor]:
    """The sections of a message (see `SharedMemoryGroup.send_messages`), which lie in its memory.

    Raises RuntimeError where the message ends before them.
    """
    if message_bytes(kinds) > len(message):
        raise RuntimeError(f"{len(message)} bytes were sent where {message_bytes(kinds)} were expected: {UNLIKE_CALLS}")
    found, at = [], 0
    for each in kinds:
        found.append(message[at : at + each.nbytes].view(each.dtype))
        at += _aligned(each.nbytes)
    return found


def message_bytes(kinds: Sequence[Section]) -> int:
    """Of a message that consists of these sections."""
    return sum(_aligned(each.nbytes) for each in kinds)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Buffer:
    """A memory file, mapped; its owner makes it larger, the others map it anew when they hear of it."""

    def __init__(self, handle: int) -> None:
        self.handle, self.bytes = handle, torch.empty(0, dtype=torch.uint8)

    def map(self, capacity: int) -> None:
        if capacity > len(self.bytes):
            self.bytes = torch.frombuffer(mmap.mmap(self.handle, capacity), dtype=torch.uint8)

    def grow(self, capacity: int) -> None:
        os.ftruncate(self.handle, capacity)
        self.map(capacity)

    def view(self, offset: int, like: Tensor) -> Tensor:
        """The elements from a byte on, as `like`: its type and shape."""
        return self.bytes[offset : offset + like.nbytes].view(like.dtype).view(like.shape)

    def close(self) -> None:
        os.close(self.handle)


class _Peer:
    """The socket to another rank, its buffers, and what it has posted that is not read yet."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank, self.connection = rank, connection
        self.buffers: dict[int, _Buffer] = {}
        self.posted: dict[int, tuple[int, int, int]] = {}  # operation: buffer, offset, bytes
        self.knows: set[int] = set()  # own buffers that it has
        self.read: list[int] = []  # operations of which it is to be told that they were read

    def post(self, message: bytes, handle: int | None) -> None:
        """Sends what was posted, with a buffer's handle where the peer has not got it yet, and which operations were read."""
        message += b"".join(map(OPERATION.pack, self.read))
        self.read.clear()
        assert len(message) <= LONGEST  # the socket would cut it, and the peer never hear of a buffer
        try:
            if handle is None:
                self.connection.send(message)
            else:
                socket.send_fds(self.connection, [message], [handle])
        except TimeoutError as error:
            raise self._timeout() from error
        except OSError as error:
            raise self._gone() from error

    def receive(self) -> list[int]:
        """Waits for the next message, and notes what was posted; the operations that the peer has read."""
        try:
            with contextlib.suppress(ConnectionResetError):  # it ended before it had read all; what it sent is still there
                return self._take_in(*socket.recv_fds(self.connection, LONGEST, 1)[:2])
            return self._take_in(*socket.recv_fds(self.connection, LONGEST, 1)[:2])
        except TimeoutError as error:
            raise self._timeout() from error
        except OSError as error:
            raise self._gone() from error

    def _take_in(self, message: bytes, handles: Sequence[int]) -> list[int]:
        if len(message) < MESSAGE.size:
            raise self._gone()
        operation, number, capacity, offset, size = MESSAGE.unpack_from(message)
        if number >= 0:
            if handles:
                self.buffers[number] = _Buffer(handles[0])
            self.buffers[number].map(capacity)
        self.posted[operation] = (number, offset, size)
        return [read for (read,) in OPERATION.iter_unpack(message[MESSAGE.size :])]

    def _timeout(self) -> RuntimeError:  # in gloo's words: they are known to who looks for the cause
        seconds = self.connection.gettimeout() or 0.0
        return RuntimeError(f"[shared memory] Timed out waiting {1000 * seconds:.0f}ms for rank {self.rank}")

    def _gone(self) -> RuntimeError:
        return RuntimeError(f"[shared memory] Connection closed by peer: rank {self.rank}")


class _Work(dist.Work):
    """A collective under way; `wait` ends it."""

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__()
        self._end: Callable[[], None] | None = end

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Copies out what the peers have sent; a second call does nothing."""
        if self._end is not None:
            end, self._end = self._end, None
            end()
        return True

    def is_completed(self) -> bool:
        """Whether `wait` has returned."""
        return self._end is None


class SharedMemoryGroup(dist.ProcessGroup):
    """A process group whose sums and all-to-all exchanges of CPU tensors go through shared memory, the rest through gloo.

    All ranks call the same operations in the same order, from one thread. Sums are taken in the order of ranks: they are the
    same to the bit on every rank, and at every run.

    Args:
        store, rank, size, timeout: of the group, as torch hands them to a backend.
        connections: {rank: connected socket} of all other ranks.
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout: timedelta, connections: dict[int, socket.socket]
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # of subclasses in Python
        gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout=timeout)  # type: ignore[attr-defined]
        kind = dist.ProcessGroup.BackendType.GLOO
        self._register_backend(torch.device("cpu"), kind, gloo)
        self._set_default_backend(kind)
        for connection in connections.values():
            connection.settimeout(timeout.total_seconds())
        self._peers = [_Peer(peer, connections[peer]) for peer in sorted(connections)]
        self._readable = select.poll()  # select.select takes no file number above 1,023, and a Ray worker has many files
        for connection in connections.values():
            self._readable.register(connection, select.POLLIN)
        self._buffers: list[_Buffer] = []
        self._free: set[int] = set()
        self._unread: dict[int, tuple[int, set[int]]] = {}  # operation: own buffer, ranks that have not read it
        self._pending: dict[int, _Work] = {}
        self._operation = 0

    def close(self) -> None:
        """Ends the connections; peers that still wait for this rank are told."""
        for peer in self._peers:
            peer.connection.close()
            for buffer in peer.buffers.values():
                buffer.close()
        for buffer in self._buffers:
            buffer.close()
        self._peers, self._buffers = [], []

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:  # type: ignore[override]
        """Sums a tensor over ranks, in place."""
        tensor, size = tensors[0], self.size()
        is_sum = opts is None or opts.reduceOp == dist.ReduceOp.SUM
        small = size <= DIRECT_RANKS or tensor.nbytes <= DIRECT_BYTES
        if not (is_sum and small and tensor.device.type == "cpu"):
            work: dist.Work = super().allreduce(list(tensors), opts or dist.AllreduceOptions())
            return work
        number, places = self._place([tensor.nbytes])
        self._buffers[number].view(0, tensor).copy_(tensor.detach())
        operation = self._post(number, {peer.rank: (places[0], tensor.nbytes) for peer in self._peers})

        def end() -> None:
            """Adds up what all ranks wrote, in their order, so that the sum is the same on each."""
            parts = {self.rank(): self._buffers[number].view(0, tensor)}
            parts |= {peer.rank: self._as(part, tensor, peer.rank, operation) for peer, part in self._arrived(operation)}
            total = tensor.detach()
            torch.add(parts[0], parts[1], out=total)
            for rank in range(2, size):
                total.add_(parts[rank])
            self._tell_read(operation)

        return self._begun(operation, end)

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> dist.Work:
        """Part r of the input goes to rank r and becomes part of its output; parts are cut along the first dimension."""
        sent = source.detach().split(_sizes(source, input_split_sizes, self.size()))
        received = output.detach().split(_sizes(output, output_split_sizes, self.size()))
        return self._exchanging([[part] for part in sent], [[part] for part in received])

    alltoall_base = all_to_all_single  # type: ignore[assignment]  # its name up to torch 2.12

    def exchange(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> None:
        """Part r of `sent` is written to part `rank` of rank r's `received`. A part is columns side by side: matrices of as many
        rows, of any strides; it may be cut otherwise where it comes from than where it goes to, but in one place it is one. Not
        differentiable: called where nothing is recorded, as within an autograd function.
        """
        self._exchanging(sent, received).wait()

    def send_messages(
        self, messages: Mapping[int, Sequence[Sequence[Tensor]]], read: Callable[[dict[int, Tensor]], None]
    ) -> dist.Work:
        """A message of any size to each other rank; all ranks send, and all get one of each.

        Args:
            messages: {rank: sections}. A section is 1-D tensors of one type, which the message holds end to end; `sections`
                takes it apart.
            read: called by `wait`, or by a later operation where too many are pending, with {rank: message, uint8}. It starts
                no operation; afterwards their memory holds something else.
        """
        kinds = {rank: [_section(tensors) for tensors in message] for rank, message in messages.items()}
        sizes = {rank: message_bytes(found) for rank, found in kinds.items()}
        number, places = self._place([sizes[peer.rank] for peer in self._peers])
        posts = {}
        for peer, place in zip(self._peers, places, strict=True):
            posts[peer.rank] = (place, sizes[peer.rank])
            whole = self._buffers[number].bytes[place : place + sizes[peer.rank]]
            for tensors, out in zip(messages[peer.rank], sections(whole, kinds[peer.rank]), strict=True):
                if len(out):
                    torch.cat(list(tensors), out=out)
        operation = self._post(number, posts)

        def end() -> None:
            read({peer.rank: message for peer, message in self._arrived(operation)})
            self._tell_read(operation)

        return self._begun(operation, end)

    def _exchanging(self, sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]]) -> dist.Work:
        me = self.rank()
        wholes = [_as_one(part) for part in sent]
        number, places = self._place([wholes[peer.rank].nbytes for peer in self._peers])
        posts = {}
        for peer, place in zip(self._peers, places, strict=True):
            whole = wholes[peer.rank]
            posts[peer.rank] = (place, whole.nbytes)
            if whole.nbytes:
                copy_columns([self._buffers[number].view(place, whole)], sent[peer.rank])
        operation = self._post(number, posts)

        def end() -> None:
            copy_columns(received[me], sent[me])
            for peer, message in self._arrived(operation):
                into = received[peer.rank]
                copy_columns(into, [self._as(message, _as_one(into), peer.rank, operation)])
            self._tell_read(operation)

        return self._begun(operation, end)

    def _place(self, sizes: Sequence[int]) -> tuple[int, list[int]]:
        """A free buffer that holds parts of these sizes in bytes, and where each begins in it."""
        if len(self._unread) >= MAX_PENDING:
            self._hear()
        if len(self._unread) >= MAX_PENDING:
            self._end_oldest()
        places, total = [], 0
        for size in sizes:
            places.append(total)
            total += _aligned(size)
        fitting = self._fitting(total)
        if not fitting:
            self._hear()
            fitting = self._fitting(total)
        if fitting:
            number = min(fitting, key=lambda each: len(self._buffers[each].bytes))
        elif self._free:
            number = max(self._free, key=lambda each: len(self._buffers[each].bytes))
        else:
            number = len(self._buffers)
            self._buffers.append(_Buffer(os.memfd_create("mtrec-exchange")))
        self._free.discard(number)
        if total > len(self._buffers[number].bytes):  # pages that are not written to take no memory
            self._buffers[number].grow(max(mmap.PAGESIZE, 1 << math.ceil(math.log2(total))))
        return number, places

    def _fitting(self, size: int) -> list[int]:
        return [number for number in self._free if len(self._buffers[number].bytes) >= size]

    def _post(self, number: int, posts: dict[int, tuple[int, int]]) -> int:
        operation, self._operation = self._operation, self._operation + 1
        buffer = self._buffers[number]
        capacity = len(buffer.bytes)
        self._unread[operation] = (number, {self.rank(), *posts})  # this rank reads its own part of a sum there, too
        for peer in self._peers:
            offset, size = posts[peer.rank]
            mapped = number if capacity else -1  # nothing was ever written to it: there is nothing to map
            first = capacity > 0 and number not in peer.knows
            peer.post(MESSAGE.pack(operation, mapped, capacity, offset, size), buffer.handle if first else None)
            if first:
                peer.knows.add(number)
        return operation

    def _begun(self, operation: int, end: Callable[[], None]) -> dist.Work:
        self._pending[operation] = work = _Work(end)
        return work

    def _arrived(self, operation: int) -> Iterator[tuple[_Peer, Tensor]]:
        """What each peer posted for an operation, as bytes in its buffer, as soon as it is there."""
        for peer in self._peers:
            while operation not in peer.posted:
                self._note(peer)
            number, offset, size = peer.posted.pop(operation)
            yield peer, peer.buffers[number].bytes[offset : offset + size] if size else torch.empty(0, dtype=torch.uint8)

    def _as(self, message: Tensor, like: Tensor, peer: int, operation: int) -> Tensor:
        """A peer's bytes as a tensor of that type and shape. Raises RuntimeError where they are not as many."""
        if len(message) != like.nbytes:
            raise RuntimeError(
                f"Rank {peer} sent {len(message)} bytes in operation {operation}; rank {self.rank()} expected {like.nbytes}: "
                f"{UNLIKE_CALLS}"
            )
        return message.view(like.dtype).view(like.shape)

    def _tell_read(self, operation: int) -> None:
        """Each peer, with the next message to it."""
        del self._pending[operation]
        for peer in self._peers:
            peer.read.append(operation)
        self._read(operation, self.rank())

    def _note(self, peer: _Peer) -> None:
        """Takes in a peer's next message."""
        for operation in peer.receive():
            self._read(operation, peer.rank)

    def _read(self, operation: int, rank: int) -> None:
        """A rank has read what was posted; after the last one the buffer is free."""
        number, unread = self._unread[operation]
        unread.discard(rank)
        if not unread:
            del self._unread[operation]
            self._free.add(number)

    def _hear(self) -> None:
        """Takes in the messages that are there, and waits for none."""
        by_file = {peer.connection.fileno(): peer for peer in self._peers}
        while ready := self._readable.poll(0):
            for file, _ in ready:
                self._note(by_file[file])

    def _end_oldest(self) -> None:
        """Ends the oldest operation that was begun here and not ended: who began it may never wait for it.

        Not before the peers have read it, too: one that waits for what this rank is about to post would never come to that. They
        end it when they have as many.
        """
        if self._pending:
            self._pending[min(self._pending)].wait()


def _section(tensors: Sequence[Tensor]) -> Section:
    return Section(tensors[0].dtype if tensors else torch.uint8, sum(map(len, tensors)))


def _as_one(columns: Sequence[Tensor]) -> Tensor:
    """The type and shape of matrices side by side (of one: itself)."""
    if len(columns) == 1:
        return columns[0]
    width = sum(each.shape[1] for each in columns)
    return columns[0].new_empty((len(columns[0]), width), device="meta") if columns else torch.empty(0, device="meta")


def copy_columns(into: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    """Matrices side by side into others that are; on one side it is one, or on both. ValueError where they do not fit."""
    if len(columns) == 1 and len(into) > 1:
        columns = columns[0].split([each.shape[1] for each in into], dim=1)
    elif len(into) == 1 and len(columns) > 1:
        into = into[0].split([each.shape[1] for each in columns], dim=1)
    if columns and into:
        for each, place in zip(columns, into, strict=True):
            if each.shape != place.shape:  # torch would repeat what is 1
                raise ValueError(f"Columns of the shape {tuple(each.shape)} are to be written where {tuple(place.shape)} is.")
            place.copy_(each)
    elif any(each.numel() for each in (*columns, *into)):
        raise ValueError(f"There is nothing to be written, or no place for it: {len(columns)} matrices, {len(into)} places.")


def _sizes(tensor: Tensor, split_sizes: Sequence[int] | None, size: int) -> list[int]:
    return list(split_sizes) if split_sizes else [len(tensor) // size] * size


def connect(timeout_seconds: float) -> SharedMemoryGroup | None:
    """A group of all ranks where all of them can share memory; None, on every rank, where one cannot. A collective.

    They can on Linux, within one network namespace of one host, as one user.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    possible = hasattr(os, "memfd_create") and hasattr(socket, "SO_PEERCRED")
    token: list[Any] = [secrets.token_hex(16) if rank == 0 else None]
    dist.broadcast_object_list(token, 0)
    if not _all(possible):
        return None
    connections: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(timeout_seconds)
        listener.bind(f"\0mtrec-{token[0]}-{rank}")
        listener.listen(size)
        dist.barrier()
        for peer in range(rank):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(f"\0mtrec-{token[0]}-{peer}")
                connection.send(struct.pack("<q", rank))
            except OSError:  # it is on another host, or in another container
                connection.close()
                break
            connections[peer] = connection
        if not _all(len(connections) == rank):
            for connection in connections.values():
                connection.close()
            return None
        while len(connections) < size - 1:
            connection, _ = listener.accept()
            user = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[1]
            if user != os.getuid():
                connection.close()
                continue
            connections[struct.unpack("<q", connection.recv(8))[0]] = connection

    def make(store: Any, rank: int, size: int, timeout: timedelta) -> SharedMemoryGroup:
        return SharedMemoryGroup(store, rank, size, timeout, connections)

    dist.Backend.register_backend(f"mtrec_{token[0]}", make, devices=["cpu"])
    group = dist.new_group(backend=f"mtrec_{token[0]}", timeout=timedelta(seconds=timeout_seconds))
    assert isinstance(group, SharedMemoryGroup)
    return group


def _all(value: bool) -> bool:
    flag = torch.tensor([int(value)])
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)
