"""LocalGrid: Flower's Grid inside one process, or over a few forked ones, with the real apps on both ends.

A message waits until it is asked for, so however many sites there are, one reply exists at a time.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from wardround.common.refusals import INTERNAL
from wardround.simulations.crew import Crew

_FIRST_NODE = 1000  # Flower numbers below are its own


class LocalGrid(Grid):
    """Delivers messages to simulated sites.

    Args:
        make_app: builds the client app; called once in every process that computes.
        sites: one site file per simulated hospital, in the plan's order.
        run_config: what Flower hands to every app: the plan's text.
        processes: 1 computes in this process; more fork that many (Linux and macOS).
    """

    def __init__(
        self, make_app: Callable[[], ClientApp], sites: Sequence[Path], run_config: dict[str, str], processes: int = 1
    ) -> None:
        self._run = Run.create_empty(run_id=secrets.randbits(63))
        # Message() reads these three; on a network Flower's runtime sets them
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self._run.run_id, 1, 1
        self._contexts = {
            _FIRST_NODE + number: Context(
                run_id=self._run.run_id,
                node_id=_FIRST_NODE + number,
                node_config={"site": str(path)},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for number, path in enumerate(sites)
        }
        self._queue: deque[Message] = deque()
        self._sent = 0
        self._app = make_app() if processes == 1 else None
        self._crew = Crew(make_app, self._contexts, processes) if processes > 1 else None

    def set_run(self, run: Run) -> None:
        """Take Flower's run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Every simulated site."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; nothing is computed yet."""
        ids = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self._sent}"
            ids.append(message.metadata.message_id)
            if self._crew is None:
                self._queue.append(message)
            else:
                self._crew.push(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The reply to the oldest message among `message_ids`; its tensors are good until the next pull.

        Older messages that are not asked for any more are given up.
        """
        wanted = set(message_ids)
        if self._crew is not None:
            return self._crew.pull(wanted)
        while self._queue:
            message = self._queue.popleft()
            if message.metadata.message_id in wanted:
                return [self._answered(message)]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Replies to all messages, in order."""
        open_ids = list(self.push_messages(messages))
        replies: list[Message] = []
        while open_ids and (arrived := list(self.pull_messages(open_ids))):
            replies += arrived
            for reply in arrived:
                open_ids.remove(reply.metadata.reply_to_message_id)
        return replies

    def close(self) -> None:
        """End the forked processes, if any."""
        if self._crew is not None:
            self._crew.close()

    def __enter__(self) -> LocalGrid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answered(self, message: Message) -> Message:
        assert self._app is not None  # there is no crew
        reply = answer(self._app, message, self._contexts[message.metadata.dst_node_id])
        reply.metadata.__dict__["_message_id"] = "r" + message.metadata.message_id
        return reply


def answer(app: ClientApp, message: Message, context: Context) -> Message:
    """What a site answers; like Flower's runtime, an exception becomes an error reply."""
    with contextlib.suppress(Exception):
        return app(message, context)
    return Message(Error(INTERNAL, "the client app failed"), reply_to=message)
