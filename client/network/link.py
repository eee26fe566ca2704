"""Flower's Fleet API as a hospital uses it: outbound calls over mutual TLS, and nothing of a bundle is ever fetched.

These are the only lines of a hospital that reach below Flower's public API; a contract test names every internal they use.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from wardround.common.errors import LinkRefused, OrderRefused

_TIMEOUT = httpx.Timeout(60.0, connect=10.0)  # seconds; a call for mail is held for 20
_FAREWELL = httpx.Timeout(3.0)  # a line that is dead must not keep a process that was told to end
_HEARTBEAT = 30  # seconds, as promised to Flower; it waits for two
_HEARTBEAT_EVERY = 10.0
_LARGEST_LETTER = 2 << 20  # bytes of a message without its tensors


class Offline(Exception):
    """The coordinator cannot be reached, or is not able to answer now; worth trying again."""


@dataclass(frozen=True)
class Mail:
    """An order that waits at the coordinator; its tensors are not fetched yet."""

    run: int
    about: Any  # Flower's message without content
    tree: Any


class Line:
    """The connection of one site.

    Args:
        address: the coordinator's host:port.
        context: TLS with this site's certificate, trusting the consortium's authority alone.
        node_key: the site's Flower key.
        proxy: an HTTP proxy to go through, such as "http://proxy.hospital.example:3128"; None goes straight, whatever the
            environment says.
    """

    def __init__(self, address: str, context: ssl.SSLContext, node_key: ec.EllipticCurvePrivateKey, proxy: str | None) -> None:
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
        from flwr.supercore.primitives.asymmetric import public_key_to_bytes
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        self._context = context
        public = node_key.public_key()
        self._key = public_key_to_bytes(public)
        self._client = FleetHttpClient(
            f"https://{address}",
            interceptors=[RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(node_key, public)],
        )
        self._client._client.close()
        self._client._client = httpx.Client(
            verify=context, timeout=_TIMEOUT, proxy=proxy, trust_env=False, follow_redirects=False
        )
        self._node: Any = None
        self._unknown = False  # whether the coordinator may have forgotten this site's number
        self._stop = threading.Event()
        self._settings: dict[int, dict[str, Any]] = {}

    def connect(self, last_number: int | None) -> int:
        """Report for duty; `last_number` is what an earlier process of this site was told.

        Returns:
            Flower's number for this site.

        Raises:
            Offline: nobody answers.
            LinkRefused: the coordinator does not want this site, in its words.
        """
        from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
        from flwr.proto.node_pb2 import Node

        if last_number is not None:  # an earlier process that was killed is still taken for present
            with contextlib.suppress(LinkRefused):
                _call(lambda: self._client.DeactivateNode(DeactivateNodeRequest(node_id=last_number)))
        request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=_HEARTBEAT)
        answer = _call(lambda: self._client.ActivateNode(request))
        beats = self._node is not None
        self._node = Node(node_id=answer.node_id)
        if not beats:
            threading.Thread(target=self._beat, daemon=True).start()
        return int(answer.node_id)

    def mail(self) -> Mail | None:
        """The next order; None if there is none for some seconds. Raises as `connect` does."""
        from flwr.common.serde import message_from_proto
        from flwr.proto.fleet_pb2 import PullMessagesRequest

        if self._unknown:
            self.connect(self._node.node_id)
            self._unknown = False
        try:
            answer = _call(lambda: self._client.PullMessages(PullMessagesRequest(node=self._node)))
        except LinkRefused:
            self._unknown = True  # perhaps the coordinator began new books, in which this site has another number
            raise
        if not answer.messages_list:
            return None
        about = message_from_proto(answer.messages_list[0])
        return Mail(about.metadata.run_id, about, answer.message_object_trees[0])

    def settings(self, run: int) -> dict[str, Any]:
        """What the coordinator says of a run: its plan and signatures. Raises as `connect` does."""
        from flwr.proto.run_pb2 import GetRunRequest

        if run not in self._settings:
            from flwr.common.serde import run_from_proto

            answer = _call(lambda: self._client.GetRun(GetRunRequest(node=self._node, run_id=run)))
            self._settings = {run: dict(run_from_proto(answer.run).override_config)}
        return self._settings[run]

    def fetch(self, mail: Mail, *, most: int) -> Any:
        """The whole message, of at most `most` bytes.

        Raises:
            OrderRefused: it is larger, or not what it says it is.
            Offline: the line broke.
            LinkRefused: it is gone.
        """
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
        from flwr.supercore.inflatable.inflatable_object import get_object_id, iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import (
            ObjectPullError,
            ObjectUnavailableError,
            inflate_object_from_contents,
            pull_objects,
        )

        left, lock = most + _LARGEST_LETTER, threading.Lock()

        def pull(name: str) -> bytes:
            nonlocal left
            request = PullObjectRequest(node=self._node, run_id=mail.run, object_id=name)
            answer = _call(lambda: self._client.PullObject(request))
            if not answer.object_found:
                raise ObjectPullError(name, "it is gone")
            if not answer.object_available:
                raise ObjectUnavailableError(name)
            with lock:
                left -= len(answer.object_content)
                if left < 0:
                    raise OrderRefused(f"the order is larger than the {most} bytes allowed here")
            if get_object_id(answer.object_content) != name:
                raise OrderRefused("a part of the order is not what it is called")
            return bytes(answer.object_content)

        names = [tree.object_id for tree in iterate_object_tree(mail.tree)]
        try:
            parts = pull_objects(names, pull_object_fn=pull, initial_backoff=0.05, backoff_cap=0.3, max_tries_per_object=None)
            message: Any = inflate_object_from_contents(mail.tree.object_id, parts)
        except (Offline, LinkRefused, OrderRefused):
            raise
        except Exception as error:  # Flower's parser speaks in many tongues of a hostile message
            raise OrderRefused("the order cannot be read", detail=repr(error)) from None
        message.metadata.__dict__["_message_id"] = mail.tree.object_id
        confirmation = ConfirmMessageReceivedRequest(node=self._node, run_id=mail.run, message_object_id=mail.tree.object_id)
        _call(lambda: self._client.ConfirmMessageReceived(confirmation))
        return message

    def send(self, reply: Any, seconds: float) -> None:
        """Send a reply whose order took `seconds` to carry out; parts that have arrived are not sent again.

        Raises:
            Offline: the line broke; calling again goes on where it stopped.
            LinkRefused: nobody waits for it any more.
        """
        from flwr.app.message.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.message_pb2 import PushObjectRequest
        from flwr.supercore.inflatable.inflatable_object import (
            get_all_nested_objects,
            get_object_tree,
            no_object_id_recompute,
        )
        from flwr.supercore.inflatable.inflatable_utils import push_object_contents_from_iterable

        if not reply.metadata.message_id:
            reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            parts, tree = get_all_nested_objects(reply), get_object_tree(reply)
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
            answer = _call(lambda: self._client.PushMessages(request))

            def push(name: str, content: bytes) -> None:
                part = PushObjectRequest(
                    node=self._node,
                    run_id=reply.metadata.run_id,
                    object_id=name,
                    object_content=content,
                    session_id=answer.session_id,
                )
                if not _call(lambda: self._client.PushObject(part)).stored:
                    raise Offline("the coordinator did not keep a part of the reply")

            wanted = ((name, parts[name].deflate()) for name in answer.objects_to_push)
            push_object_contents_from_iterable(wanted, push_object_fn=push)

    def show(self, certificate: Path, key: Path) -> None:
        """Show this certificate from the next connection on; raises `OSError` where it cannot be used."""
        self._context.load_cert_chain(certificate, key)

    def trust(self) -> str:
        """The consortium's newest revocation list and certificates, for `Bundle.parse`. Raises as `connect` does."""

        def ask() -> str:
            answer = self._client._client.get(f"{self._client._base_url}/trust")
            answer.raise_for_status()
            return answer.text

        return str(_call(ask))

    def close(self) -> None:
        """Say goodbye, if anybody listens, and hang up."""
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        self._stop.set()
        self._client._client.timeout = _FAREWELL
        if self._node is not None:
            with contextlib.suppress(Offline, LinkRefused):
                _call(lambda: self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id)))
        self._client.close()

    def _beat(self) -> None:
        while not self._stop.wait(_HEARTBEAT_EVERY):
            with contextlib.suppress(Exception):  # whatever it was: the calls for mail say so as well, and the next beat may do
                _call(self._heartbeat)

    def _heartbeat(self) -> Any:
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        return self._client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_HEARTBEAT))


def _call(act: Callable[[], Any]) -> Any:
    """One call; what the coordinator says in refusal is kept, cut short."""
    try:
        return act()
    except (httpx.TransportError, httpx.DecodingError, DecodeError) as error:  # the last two: a proxy's page
        raise Offline(f"the coordinator cannot be reached ({type(error).__name__})") from None
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (408, 429, 500, 502, 503, 504):
            raise Offline(f"the coordinator cannot answer now (HTTP {status})") from None
        raise LinkRefused(_words(error.response), detail=f"HTTP {status}") from None


def _words(response: httpx.Response) -> str:
    if response.status_code == 401:
        there = response.headers.get("date", "an unknown time")
        return f"the coordinator does not accept this site's signature; its clock says {there}, compare it with this one"
    try:
        found = response.json()
        text = str(found.get("detail") or found.get("message") or "")
    except (ValueError, AttributeError):
        text = ""
    text = "".join(c if c.isprintable() else " " for c in text)[:200]
    return f"the coordinator refuses: {text or f'HTTP {response.status_code}'}"
