"""A crew of forked processes that compute for simulated sites, with shared memory for models and updates.

    parent                               process k  (sites k, k + n, k + 2n, ...)
      model, once a round  -- shared -->   reads it in place
      question             -- pipe --->    answers it, training where it is asked to
      facts                <-- pipe ---    after its update is in the place the question named
      the update           <- shared --    goes on with the next question meanwhile

A site lives in one process from the roll call to the farewell, so its records and its ledger are open once, and the parent
opens neither: a fork must not carry a database along. Questions go out in order, as many as there are places for updates,
and replies are handed out in the same order. A process that dies costs the replies it owed, not the study.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import mmap
import os
import signal
import tempfile
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NoReturn

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from wardround.common.errors import ConfigError, UpdateRefused
from wardround.common.refusals import INTERNAL
from wardround.common.weights import Shapes, Weights, pack, unpack

_SPARE_BYTES = 64 << 20  # for updates that are done before their turn: small models get more places than large ones
_SPARE_PLACES = 3  # for each process, at most
_ALIGNED = 16  # numbers, 64 bytes: where a tensor may begin

log = logging.getLogger("wardround.site")

_Answer = tuple[dict[str, Any] | None, list[str], tuple[int, str] | None]  # facts, tensors left in the place, error


@dataclass(frozen=True)
class _Question:
    """What a process is told; the numbers of the model are in shared memory already."""

    key: str
    place: int
    with_model: bool
    site: int
    kind: str
    group: str
    facts: dict[str, Any]


class _Memory:
    """Memory that all processes see: the round's model, and `places` for updates on their way to the parent."""

    def __init__(self, file: int, shapes: Shapes, places: int) -> None:
        self.file, self.shapes = file, shapes
        self.free = list(range(places))
        size = max(_ALIGNED, sum(_room(shape) for shape in shapes.of.values()))
        numbers = torch.frombuffer(_mapped(file, 4 * size * (places + 1)), dtype=torch.float32)
        self.model, *self.places = [_views(part, shapes) for part in numbers.view(places + 1, size)]


@dataclass
class _Member:
    """One process."""

    pid: int
    pipe: Connection
    memory: _Memory | None = None  # which one it was given


@dataclass(frozen=True)
class _UnderWay:
    """A question that was sent: to whom, and which place it holds."""

    message: Message
    home: int
    memory: _Memory
    place: int


class Crew:
    """Forks at once, while the parent is small; `make_app` builds the client app in every process."""

    def __init__(self, make_app: Callable[[], ClientApp], contexts: Mapping[int, Context], processes: int) -> None:
        if not hasattr(os, "fork"):
            raise ConfigError("more than one process needs a system that can fork (Linux or macOS)")
        self._make_app = make_app
        self._contexts = dict(contexts)
        self._count = max(1, min(processes, len(contexts)))
        self._home = {site: number % self._count for number, site in enumerate(contexts)}
        self._members: dict[int, _Member] = {}
        self._memory = self._made(Shapes({}))
        self._loaded: Callable[[], ArrayRecord | None] = lambda: None  # whose numbers the memory holds, if it still lives
        self._line: deque[Message] = deque()  # not handed out yet, in order
        self._waiting: deque[Message] = deque()  # the end of that line: not sent yet
        self._under_way: dict[str, _UnderWay] = {}
        self._arrived: dict[str, tuple[Message, _UnderWay]] = {}
        self._abandoned: set[str] = set()  # under way, and nobody waits for them any more
        self._lent: tuple[_Memory, int] | None = None  # the place behind the reply handed out last
        for home in range(self._count):
            self._fork(home)

    def push(self, message: Message) -> None:
        """Queue a question for the process its site lives in."""
        self._line.append(message)
        self._waiting.append(message)
        self._feed()

    def pull(self, wanted: Collection[str]) -> list[Message]:
        """The next reply in order, once it is there; an empty list when none of `wanted` is left.

        Its tensors are good until the next pull. Questions before it that are not in `wanted` are given up.
        """
        if self._lent is not None:
            memory, place = self._lent
            memory.free.append(place)
            self._lent = None
        while self._line:
            message = self._line.popleft()
            key = message.metadata.message_id
            if key not in wanted:
                self._give_up(key)
                continue
            self._feed()
            while key not in self._arrived:
                # what was given up may still hold the model or a place; then that has to end first
                asked = self._under_way.get(key) or next(iter(self._under_way.values()))
                self._listen(asked.home)
                self._feed()
            reply, asked = self._arrived.pop(key)
            self._lent = (asked.memory, asked.place)
            return [reply]
        return []

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        for home in list(self._members):
            self._end(home)
        if self._memory.file >= 0:
            os.close(self._memory.file)
            self._memory.file = -1

    def _feed(self) -> None:
        """Send what can be sent: there must be a place, and the memory must hold the question's model."""
        while self._waiting:
            message = self._waiting[0]
            record = message.content.get("model")
            if isinstance(record, ArrayRecord) and record is not self._loaded():
                if self._under_way:
                    return
                self._load(record)
            if not self._memory.free:
                return
            self._send(self._waiting.popleft(), with_model=isinstance(record, ArrayRecord))

    def _send(self, message: Message, *, with_model: bool) -> None:
        meta = message.metadata
        home = self._home[meta.dst_node_id]
        asked = _UnderWay(message, home, self._memory, self._memory.free.pop())
        self._under_way[meta.message_id] = asked
        facts = dict(message.content["facts"])
        question = _Question(
            meta.message_id, asked.place, with_model, meta.dst_node_id, meta.message_type, meta.group_id, facts
        )
        if home not in self._members:
            self._fork(home)
        member = self._members[home]
        try:
            if member.memory is not self._memory:
                member.pipe.send((self._memory.shapes, len(self._memory.places)))
                send_handle(member.pipe, self._memory.file, member.pid)
                member.memory = self._memory
            member.pipe.send(question)
        except OSError:
            self._bury(home)

    def _load(self, record: ArrayRecord) -> None:
        """Put a model where every process sees it; none is at work now."""
        shapes = Shapes({name: tuple(array.shape) for name, array in record.items()})
        weights = unpack(record, shapes)
        if shapes != self._memory.shapes:
            old, self._memory = self._memory, self._made(shapes)
            os.close(old.file)  # replies still to be read keep their memory; the file is not needed for it
        for name, tensor in weights.items():
            self._memory.model[name].copy_(tensor)
        self._loaded = weakref.ref(record)

    def _listen(self, home: int) -> None:
        """Take one answer of a process, or notice that it has died."""
        try:
            key, (facts, updated, error) = self._members[home].pipe.recv()
        except (EOFError, OSError):
            self._bury(home)
            return
        asked = self._under_way[key]
        if error is not None:
            self._arrive(key, Message(Error(*error), reply_to=asked.message))
            return
        content = RecordDict({"facts": ConfigRecord(facts)})
        if updated:
            place = asked.memory.places[asked.place]
            content["model"] = pack({name: place[name] for name in updated})
        self._arrive(key, Message(content, reply_to=asked.message))

    def _arrive(self, key: str, reply: Message) -> None:
        asked = self._under_way.pop(key)
        if key in self._abandoned:
            self._abandoned.remove(key)
            asked.memory.free.append(asked.place)
            return
        reply.metadata.__dict__["_message_id"] = "r" + key
        self._arrived[key] = (reply, asked)

    def _give_up(self, key: str) -> None:
        if key in self._under_way:
            self._abandoned.add(key)
        elif key in self._arrived:
            _, asked = self._arrived.pop(key)
            asked.memory.free.append(asked.place)
        else:  # it is the oldest of those not sent
            self._waiting.popleft()

    def _bury(self, home: int) -> None:
        """A process died: what it was asked ends in error replies; the next question for its sites forks a new one."""
        self._end(home)
        for key in [key for key, asked in self._under_way.items() if asked.home == home]:
            error = Error(INTERNAL, "the process that served this site died")
            self._arrive(key, Message(error, reply_to=self._under_way[key].message))

    def _end(self, home: int) -> None:
        member = self._members.pop(home)
        member.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        with contextlib.suppress(ChildProcessError):
            os.waitpid(member.pid, 0)

    def _made(self, shapes: Shapes) -> _Memory:
        spare = min(_SPARE_PLACES * self._count, _SPARE_BYTES // max(1, shapes.nbytes))
        return _Memory(_file(), shapes, self._count + max(1, spare))

    def _fork(self, home: int) -> None:
        ours, theirs = Pipe()
        # Ctrl-C must neither lose a process that was just made nor run the parent's clean-up in it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of any thread; ours hold no lock here
                pid = os.fork()
            if pid:
                self._members[home] = _Member(pid, ours)
                theirs.close()
                return
            try:
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                ours.close()
                for sister in self._members.values():  # else they would not notice the parent's end
                    sister.pipe.close()
                _serve(self._make_app, self._contexts, theirs)
            finally:
                os._exit(1)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(make_app: Callable[[], ClientApp], contexts: Mapping[int, Context], pipe: Connection) -> NoReturn:
    """The life of a forked process; it ends when the parent closes the pipe or ends itself."""
    gc.freeze()  # the collector would touch, and so copy, every page the parent shares
    torch.set_num_threads(1)
    memory: _Memory | None = None
    try:
        app = make_app()
        while True:
            told = pipe.recv()
            if isinstance(told, _Question):
                assert memory is not None
                pipe.send((told.key, _answered(app, told, contexts[told.site], memory)))
            else:
                memory = None
                file = recv_handle(pipe)
                memory = _Memory(file, *told)
                os.close(file)
    except (EOFError, OSError):
        os._exit(0)
    except Exception:
        log.exception("a process that serves simulated sites failed")
        os._exit(1)


def _answered(app: ClientApp, question: _Question, context: Context, memory: _Memory) -> _Answer:
    content = RecordDict({"facts": ConfigRecord(question.facts)})
    if question.with_model:
        content["model"] = pack(memory.model)
    try:
        reply = app(Message(content, question.site, question.kind, group_id=question.group), context)
        if reply.has_error():
            return None, [], (reply.error.code, reply.error.reason or "")
        facts, record = dict(reply.content["facts"]), reply.content.get("model")
        if not isinstance(record, ArrayRecord):
            return facts, [], None
        # what does not learn is in the round's model and not in an update
        update = unpack(record, Shapes({name: shape for name, shape in memory.shapes.of.items() if name in record}))
        with torch.no_grad():
            for name, tensor in update.items():
                memory.places[question.place][name].copy_(tensor)
        return facts, list(update), None
    except UpdateRefused as error:
        return None, [], (INTERNAL, str(error))
    except Exception:
        return None, [], (INTERNAL, "the client app failed")


def _views(numbers: Tensor, shapes: Shapes) -> Weights:
    found, start = {}, 0
    for name, shape in shapes.of.items():
        found[name] = numbers[start : start + math.prod(shape)].view(shape)
        start += _room(shape)
    return found


def _room(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // _ALIGNED) * _ALIGNED


def _file() -> int:
    """A nameless file in memory (on macOS: on disk)."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("wardround")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _mapped(file: int, size: int) -> mmap.mmap:
    if os.fstat(file).st_size < size:
        os.ftruncate(file, size)
    return mmap.mmap(file, size)
