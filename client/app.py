"""The hospital's side of every message: a Flower ClientApp around `Hospital`.

Nothing but wardround's own words leaves: any other exception becomes a reference to the site's log, because a message
such as "KeyError: 'Hansen, 1952'" names a patient.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from wardround.client.hospital import CoinsFor, Hospital, os_coins
from wardround.common.devices import keep_memory
from wardround.common.errors import ConfigError, DataRefused, OrderRefused, RoundTaken, WardroundError
from wardround.common.messages import (
    CountFacts,
    Farewell,
    LookFacts,
    OrderFacts,
    RollCall,
    pack_with_model,
    unpack_model,
)
from wardround.common.plan import SignedText
from wardround.common.refusals import INTERNAL, REFUSED, ROUND_TAKEN

_OPEN_HOSPITALS = 256  # each may hold a ledger file and its records open

log = logging.getLogger("wardround.site")


def _in_our_own_words(act: Callable[[Message, Context], Message]) -> Callable[[Message, Context], Message]:
    def guarded(message: Message, context: Context) -> Message:
        try:
            return act(message, context)
        except ConfigError as error:  # may quote the site's own file
            log.error("%s", error)
            return Message(Error(REFUSED, "the plan or this site's file is not valid"), reply_to=message)
        except DataRefused as error:  # why, and even about which column, is a figure of patients
            log.error("refused: %s%s", error, f" ({error.detail})" if error.detail else "")
            act_of = {"evaluate": "evaluate", "query.counts": "count"}.get(message.metadata.message_type, "train")
            return Message(Error(REFUSED, f"this site cannot {act_of} now; see the site's log"), reply_to=message)
        except WardroundError as error:
            log.warning("refused: %s%s", error, f" ({error.detail})" if error.detail else "")
            code = ROUND_TAKEN if isinstance(error, RoundTaken) else REFUSED
            return Message(Error(code, str(error)), reply_to=message)
        except Exception:
            reference = secrets.token_hex(2)
            log.exception("internal error, ref %s", reference)
            return Message(Error(INTERNAL, f"internal error, see the site's log, ref {reference}"), reply_to=message)

    return guarded


def client_app(coins_for: CoinsFor = os_coins) -> ClientApp:
    """A ClientApp; `coins_for` exists for tests and cannot be reached by any configuration."""
    app = ClientApp()
    hospitals = _Hospitals(coins_for)

    @app.query()
    @_in_our_own_words
    def roll_call(message: Message, context: Context) -> Message:
        study = _plan(context)
        present = hospitals.at(context).present(study, RollCall.unpack(message.content))
        return Message(present.pack(), reply_to=message)

    @app.train()
    @_in_our_own_words
    def train(message: Message, context: Context) -> Message:
        hospital, study = hospitals.at(context), _plan(context)
        order = OrderFacts.unpack(message.content)
        weights = unpack_model(message.content, hospital.shapes(study))
        facts, update = hospital.train(study, order, weights)
        return Message(pack_with_model(facts, update), reply_to=message)

    @app.evaluate()
    @_in_our_own_words
    def evaluate(message: Message, context: Context) -> Message:
        hospital, study = hospitals.at(context), _plan(context)
        look = LookFacts.unpack(message.content)
        weights = unpack_model(message.content, hospital.shapes(study))
        return Message(hospital.evaluate(study, look, weights).pack(), reply_to=message)

    @app.query("counts")
    @_in_our_own_words
    def counts(message: Message, context: Context) -> Message:
        counted = hospitals.at(context).count(_plan(context), CountFacts.unpack(message.content))
        return Message(counted.pack(), reply_to=message)

    @app.query("close")
    @_in_our_own_words
    def close(message: Message, context: Context) -> Message:
        settled = hospitals.at(context).settle(_plan(context), Farewell.unpack(message.content))
        return Message(settled.pack(), reply_to=message)

    return app


class _Hospitals:
    """The hospitals this process serves: one in a deployment, many in a simulation; the least used is closed."""

    def __init__(self, coins_for: CoinsFor) -> None:
        self._coins_for = coins_for
        self._open: OrderedDict[str, Hospital] = OrderedDict()
        self._lock = threading.Lock()

    def at(self, context: Context) -> Hospital:
        path = context.node_config.get("site")
        if not isinstance(path, str):
            raise OrderRefused("this client was started without a site file")
        with self._lock:
            if path not in self._open:
                keep_memory()
                self._open[path] = Hospital(Path(path), self._coins_for)
            self._open.move_to_end(path)
            while len(self._open) > _OPEN_HOSPITALS:
                self._open.popitem(last=False)[1].close()
            return self._open[path]


@lru_cache(maxsize=16)
def _received(text: object) -> SignedText:
    return SignedText.received(text)


def _plan(context: Context) -> SignedText:
    return _received(context.run_config.get("plan"))


app = client_app()
