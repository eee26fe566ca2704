"""A hospital in one object: its file, its ledger, its records, and what it does in a round.

The order of things in `train` is the guarantee: admit, reserve, mark, and only then open the records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import safetensors.torch

from wardround.client.data import open_records
from wardround.client.dp import Coins, OsCoins, preflight, refuse_coupled
from wardround.client.ledger import Cohort, Moment, PrivacyLedger
from wardround.client.policy import DataSource, SiteConfig
from wardround.client.training.supervised import batches, plain_update, private_update, working_model, working_shapes
from wardround.common.devices import device
from wardround.common.errors import DataRefused, OrderRefused, PlanRefused
from wardround.common.messages import Farewell, OrderFacts, Present, RollCall, Settled, UpdateFacts
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.registry import look_up
from wardround.common.tasks import TASKS, Records, Task
from wardround.common.weights import Shapes, Weights, digest

CoinsFor = Callable[[str, int], Coins]  # (site, round) -> coins; tests inject one, no configuration can

log = logging.getLogger("wardround.site")


def os_coins(site: str, round: int) -> Coins:
    """Fresh secret coins for every round."""
    return OsCoins()


class Hospital:
    """One site. Holds no weights between rounds and no patient's record before its cost is on disk."""

    def __init__(self, path: Path, coins_for: CoinsFor = os_coins) -> None:
        self.config = SiteConfig.load(path)
        self._coins_for = coins_for
        self._device = device(self.config.compute.device)
        self._records: dict[str, Records] = {}
        self._admitted: set[str] = set()
        self._ledger: PrivacyLedger | None = None

    @property
    def ledger(self) -> PrivacyLedger:
        """The ledger, opened and verified on first use."""
        if self._ledger is None:
            self._ledger = PrivacyLedger(self.config.state / "ledger.sqlite")
        return self._ledger

    def close(self) -> None:
        """Forget the records and give the ledger back."""
        self._records.clear()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def shapes(self, study: SignedText) -> Shapes:
        """The shapes a model of an admitted study must have; built here, not taken from the coordinator."""
        self._admit(study)
        return working_shapes(look_up("task", study.plan.task, TASKS), study.plan.model, self._device)

    def present(self, study: SignedText, call: RollCall) -> Present:
        """Answer the roll call: takes part, or why not."""
        refusal = ""
        try:
            self._admit(study)
        except PlanRefused as error:
            refusal = str(error)
        head = self.ledger.head if study.plan.privacy else ""
        return Present(self.config.site, call.study, refusal, head)

    def train(self, study: SignedText, order: OrderFacts, weights: Weights) -> tuple[UpdateFacts, Weights]:
        """One round: admit -> reserve -> mark -> open the records -> learn -> store the answer.

        Raises:
            WardroundError: any refusal, in words that may leave the site.
        """
        if order.study != study.digest:
            raise OrderRefused("the order belongs to another study plan")
        self._admit(study)
        plan = study.plan
        attempts = plan.privacy.max_attempts if plan.privacy else 1
        if not 1 <= order.round <= plan.rounds or not 1 <= order.attempt <= attempts:
            raise OrderRefused(f"the plan has no round {order.round}, attempt {order.attempt}")
        if plan.privacy is None:
            update = self._learn_plainly(plan, order, weights)
            return self._facts(order, ledger_head="", steps_spent=0), update
        return self._train_privately(study, order, weights)

    def settle(self, study: SignedText, farewell: Farewell) -> Settled:
        """End a study: give back what was not spent."""
        if farewell.study != study.digest:
            raise OrderRefused("the farewell belongs to another study plan")
        if study.plan.privacy is None:
            return Settled(self.config.site, farewell.study, "", 0)
        steps = self.ledger.settle(study=study.digest, run=farewell.run)
        return Settled(self.config.site, farewell.study, self.ledger.head, steps)

    def _admit(self, study: SignedText) -> None:
        if study.digest in self._admitted:
            return
        plan, site = study.plan, self.config.site
        source = self.config.data.get(plan.task)
        self.config.allow.admit(plan, site, source.declared_patients if source else None)
        if source is None:
            raise PlanRefused(f"{site} does not take part: it has no data for task {plan.task}")
        task = look_up("task", plan.task, TASKS)
        if (size := task.size(plan.model)) > self.config.allow.parameters:
            most = self.config.allow.parameters
            raise PlanRefused(f"{site} does not take part: a model of {size:,} numbers is larger than the {most:,} allowed")
        model = working_model(task, plan.model, self._device)
        if plan.privacy is None:
            refuse_coupled(model)
        else:  # on nobody's records, so that nothing of it can happen after a ledger entry
            preflight(model, task.loss, task.blank(1).to(self._device))
        self._admitted.add(study.digest)

    def _train_privately(self, study: SignedText, order: OrderFacts, weights: Weights) -> tuple[UpdateFacts, Weights]:
        plan, privacy, ledger = study.plan, study.plan.private(), self.ledger
        allow = self.config.allow
        assert allow.epsilon_lifetime is not None  # `admit` refuses otherwise
        ledger.must_hold(order.ledger_head)
        cohort = Cohort(self._source(plan).cohort, allow.epsilon_lifetime, allow.delta)
        noise_multiplier = plan.noise_multiplier()
        ledger.reserve(
            cohort,
            study=study.digest,
            name=plan.name,
            run=order.run,
            steps=plan.noised_steps(noise_multiplier),
            steps_per_round=plan.local.steps,
        )
        moment = Moment(study.digest, order.run, order.round, order.attempt)
        stored = ledger.mark(moment, model=digest(weights))
        if stored is not None:
            return self._facts_of(order), safetensors.torch.load(stored)
        task = look_up("task", plan.task, TASKS)
        records = self._training_records(plan, task)  # from here on patients are read; their cost is on disk
        update = private_update(
            task,
            working_model(task, plan.model, self._device),
            {name: tensor.to(self._device) for name, tensor in weights.items()},
            records,
            local=plan.local,
            privacy=privacy,
            noise_multiplier=noise_multiplier,
            declared_patients=plan.sites[self.config.site],
            coins=self._coins_for(self.config.site, order.round),
        )
        update = {name: tensor.detach().cpu().contiguous() for name, tensor in update.items()}
        ledger.answer(moment, reply=safetensors.torch.save(update))
        return self._facts_of(order), update

    def _learn_plainly(self, plan: StudyPlan, order: OrderFacts, weights: Weights) -> Weights:
        task = look_up("task", plan.task, TASKS)
        records = self._training_records(plan, task)
        if not len(records):
            raise DataRefused("there is no record to train on")
        update = plain_update(
            task,
            working_model(task, plan.model, self._device),
            {name: tensor.to(self._device) for name, tensor in weights.items()},
            records,
            local=plan.local,
            batches=batches(records, plan.local, seed=plan.seed, site=self.config.site, round=order.round),
        )
        return {name: tensor.cpu() for name, tensor in update.items()}

    def _training_records(self, plan: StudyPlan, task: Task) -> Records:
        if plan.task not in self._records:
            records, _ = open_records(self._source(plan), task)
            self._records[plan.task] = records.to(self._device)
        return self._records[plan.task]

    def _source(self, plan: StudyPlan) -> DataSource:
        return self.config.data[plan.task]

    def _facts_of(self, order: OrderFacts) -> UpdateFacts:
        # after the answer is on disk: a copy of the ledger from before it is older than what the coordinator then knows
        return self._facts(order, ledger_head=self.ledger.head, steps_spent=self.ledger.spent(order.run))

    def _facts(self, order: OrderFacts, *, ledger_head: str, steps_spent: int) -> UpdateFacts:
        return UpdateFacts(self.config.site, order.study, order.run, order.round, order.attempt, ledger_head, steps_spent)
