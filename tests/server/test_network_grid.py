"""The network's grid: Flower's surprises do not reach a study, and only sealed replies do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from wardround.common.errors import TrustRefused, UpdateRefused
from wardround.server.network import grid as network_grid
from wardround.server.network.grid import NetworkGrid
from wardround.server.network.link import _with_limit
from wardround.server.network.post import Seats

NODE_UNAVAILABLE = 5  # Flower's


@dataclass
class Node:
    node_id: int
    public_key: bytes
    last_activated_at: str = "monday"
    status: str = "online"


class Flower:
    """Flower's grid, made of what a test says."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = list(nodes)
        self.sent: dict[str, Message] = {}
        self.replies: list[Message] = []
        self.takes = True

    def get_nodes(self) -> list[Node]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            ids.append(f"flower-{len(self.sent)}" if self.takes else None)
            if self.takes:
                message.metadata.__dict__["_message_id"] = ids[-1]
                self.sent[str(ids[-1])] = message
        return ids

    def pull_messages(self, ids: list[str]) -> list[Message]:
        found = [reply for reply in self.replies if reply.metadata.reply_to_message_id in ids]
        self.replies = [reply for reply in self.replies if reply not in found]
        return found

    def answers(self, number: str, said: str | Error) -> None:
        content = said if isinstance(said, Error) else RecordDict({"said": ConfigRecord({"text": said})})
        self.replies.append(Message(content, reply_to=self.sent[number]))


class Post:
    """Seals by writing the site's name; a reply that says "forged" does not open."""

    def __init__(self) -> None:
        self.count = 0

    def seal(self, site: str, action: str, content: RecordDict) -> tuple[RecordDict, str]:
        self.count += 1
        return RecordDict({**content, "seal": ConfigRecord({"to": site})}), f"order-{self.count}"

    def open(self, site: str, order: str, reply: Message) -> RecordDict | Error:
        if reply.has_error():
            raise UpdateRefused("the reply is not sealed")
        text = reply.content["said"]["text"]  # type: ignore[index]
        if text == "forged":
            raise UpdateRefused("the reply is another site's")
        if text == "no":
            return Error(700, "not today")
        return RecordDict({"opened": ConfigRecord({"by": order, "text": str(text)})})


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch) -> Flower:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 1
    monkeypatch.setattr(network_grid, "_LOOK_SECONDS", 0.0)
    return Flower(Node(11, b"a"), Node(12, b"b"), Node(13, b"stranger"))


def opened(flower: Flower) -> NetworkGrid:
    return NetworkGrid(flower, {b"a": "site-a", b"b": "site-b"}, Post())


def order(address: int = 11) -> Message:
    return Message(RecordDict({"facts": ConfigRecord({"round": 1})}), address, "train", group_id="1")


def test_only_the_plans_sites_that_are_connected_exist(flower: Flower):
    flower.nodes[1].status = "offline"
    assert list(opened(flower).get_node_ids()) == [11]


def test_who_is_connected_is_told(flower: Flower):
    seen: list[list[str]] = []
    list(NetworkGrid(flower, {b"a": "site-a", b"b": "site-b"}, Post(), seen=seen.append).get_node_ids())
    assert seen == [["site-a", "site-b"]]


def test_an_order_goes_out_sealed_and_its_reply_comes_back_opened_under_the_callers_id(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    (known,) = grid.push_messages([order()])
    assert flower.sent["flower-0"].content["seal"]["to"] == "site-a"  # type: ignore[index]
    assert list(grid.pull_messages([known])) == []
    flower.answers("flower-0", "yes")
    (reply,) = grid.pull_messages([known])
    assert reply.metadata.reply_to_message_id == known
    assert reply.metadata.src_node_id == 11
    assert dict(reply.content["opened"]) == {"by": "order-1", "text": "yes"}  # type: ignore[arg-type]
    assert list(grid.pull_messages([known])) == []


def test_a_refusal_of_a_site_is_an_error_in_its_words(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    (known,) = grid.push_messages([order()])
    flower.answers("flower-0", "no")
    (reply,) = grid.pull_messages([known])
    assert (reply.error.code, reply.error.reason) == (700, "not today")


@pytest.mark.parametrize("said", ["forged", Error(700, "in nobody's name")])
def test_a_reply_that_does_not_open_is_a_refusal_and_never_content(flower: Flower, said: str | Error):
    grid = opened(flower)
    list(grid.get_node_ids())
    (known,) = grid.push_messages([order()])
    flower.answers("flower-0", said)
    (reply,) = grid.pull_messages([known])
    assert reply.has_error()
    assert not reply.has_content()


@pytest.mark.parametrize("code", [3, 4, NODE_UNAVAILABLE])
def test_what_flower_says_in_a_sites_place_is_no_reply_and_the_order_goes_out_again(flower: Flower, code: int):
    grid = opened(flower)
    list(grid.get_node_ids())
    (known,) = grid.push_messages([order()])
    flower.nodes[0].status = "offline"
    flower.answers("flower-0", Error(code, "Node Unavailable"))
    assert list(grid.pull_messages([known])) == []
    assert len(flower.sent) == 1
    flower.nodes[0].status = "online"
    assert list(grid.pull_messages([known])) == []
    flower.answers("flower-1", "yes")
    (reply,) = grid.pull_messages([known])
    assert dict(reply.content["opened"])["by"] == "order-2"  # type: ignore[call-overload]


def test_a_site_that_was_started_anew_is_asked_again_and_answers_once(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    (known,) = grid.push_messages([order()])
    flower.nodes[0].last_activated_at = "tuesday"
    assert list(grid.pull_messages([known])) == []
    assert list(flower.sent) == ["flower-0", "flower-1"]
    assert list(grid.pull_messages([known])) == []
    assert list(flower.sent) == ["flower-0", "flower-1"]
    flower.answers("flower-0", "late")
    flower.answers("flower-1", "yes")
    (reply,) = grid.pull_messages([known])
    assert dict(reply.content["opened"])["text"] == "yes"  # type: ignore[call-overload]


def test_an_order_nobody_waits_for_is_not_sent_again(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    first, second = grid.push_messages([order(11), order(12)])
    list(grid.pull_messages([second]))
    flower.nodes[0].last_activated_at = "tuesday"
    list(grid.pull_messages([second]))
    assert len(flower.sent) == 2
    assert first != second


def test_an_order_that_flower_does_not_take_is_kept_for_later(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    flower.takes = False
    (known,) = grid.push_messages([order()])
    flower.takes = True
    list(grid.pull_messages([known]))
    flower.answers("flower-0", "yes")
    assert len(list(grid.pull_messages([known]))) == 1


def test_send_and_receive_ends_with_its_time(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    assert list(grid.send_and_receive([order()], timeout=0.2)) == []


class Choking(Flower):
    """Raises as Flower does where a reply among those it fetched cannot be read; all of them are gone then."""

    def pull_messages(self, ids: list[str]) -> list[Message]:
        found = super().pull_messages(ids)
        if any(reply.has_content() and reply.content["said"]["text"] == "garbage" for reply in found):  # type: ignore[index]
            raise ValueError("Error parsing message")
        return found


def test_a_reply_that_flower_cannot_read_costs_its_site_the_round_and_nobody_else(flower: Flower):
    choking = Choking(*flower.nodes)
    grid = opened(choking)
    list(grid.get_node_ids())
    bad, good = grid.push_messages([order(11), order(12)])
    replies: dict[str, Message] = {}
    for _ in range(4):
        for number, sent in list(choking.sent.items()):
            choking.answers(number, "garbage" if sent.metadata.dst_node_id == 11 else "yes")
        replies |= {reply.metadata.reply_to_message_id: reply for reply in grid.pull_messages([bad, good])}
    assert replies[bad].error.reason == "the reply cannot be read"
    assert replies[good].has_content()
    assert len(choking.sent) == 4  # each was asked once more


def test_where_flower_itself_does_not_answer_no_site_is_blamed(flower: Flower, monkeypatch: pytest.MonkeyPatch):
    def gone(*given: object) -> list[Any]:
        raise ConnectionError

    grid = opened(flower)
    list(grid.get_node_ids())
    (known,) = grid.push_messages([order()])
    monkeypatch.setattr(flower, "pull_messages", gone)
    monkeypatch.setattr(flower, "get_nodes", gone)
    with pytest.raises(ConnectionError):
        grid.pull_messages([known])


def test_a_reply_with_no_content_at_all_is_a_refusal(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    (known,) = grid.push_messages([order()])
    flower.answers("flower-0", "yes")
    flower.replies[0].__dict__["_content"] = None
    (reply,) = grid.pull_messages([known])
    assert reply.error.reason == "it cannot be read"


def test_a_reply_larger_than_a_model_is_not_fetched():
    class Client:
        def PullMessages(self, request: object) -> object:
            return SimpleNamespace(messages_list=[request])

        def PullObject(self, request: object) -> object:
            return SimpleNamespace(object_content=b"12345")

    client = Client()
    _with_limit(client, 11)
    for _ in range(2):  # a new message, a new allowance
        client.PullMessages(1)
        client.PullObject(1)
        client.PullObject(1)
    with pytest.raises(UpdateRefused, match="larger than 11 bytes"):
        client.PullObject(1)


def test_a_site_that_is_enrolled_while_its_study_waits_is_seen(flower: Flower):
    keys = {"site-a": b"a"}

    class Roster:
        def node_key(self, name: str) -> bytes:
            if name not in keys:
                raise TrustRefused(f"{name} is not in the roster")
            return keys[name]

    roster: Any = Roster()
    grid = NetworkGrid(flower, Seats(roster, ("site-a", "site-b")), Post())
    assert list(grid.get_node_ids()) == [11]
    keys["site-b"] = b"b"
    assert list(grid.get_node_ids()) == [11, 12]


def test_a_site_that_stays_away_costs_one_wait_and_not_one_a_round(flower: Flower):
    grid = opened(flower)
    list(grid.get_node_ids())
    (first,) = grid.push_messages([order()])
    flower.nodes[0].status = "offline"
    flower.answers("flower-0", Error(NODE_UNAVAILABLE, "Node Unavailable"))
    assert list(grid.pull_messages([first])) == []  # this one is waited for: it may come back
    list(grid.get_node_ids())
    for _ in range(2):
        (known,) = grid.push_messages([order()])
        (reply,) = grid.pull_messages([known])
        assert (reply.metadata.reply_to_message_id, reply.error.reason) == (known, "site-a is away")
    assert len(flower.sent) == 1
    flower.nodes[0].status, flower.nodes[0].last_activated_at = "online", "tuesday"
    list(grid.get_node_ids())
    (third,) = grid.push_messages([order()])
    assert len(flower.sent) == 2
    flower.answers("flower-1", "yes")
    (reply,) = grid.pull_messages([third])
    assert reply.has_content()
