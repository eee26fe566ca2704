"""A hospital in one object: its file, its ledger, its records, and what it does in a round.

The order of things in `train` is the guarantee: admit, reserve, mark, and only then open the records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch

from wardround.client.data import open_parted, open_records
from wardround.client.dp import Coins, OsCoins, preflight, refuse_coupled
from wardround.client.ledger import Cohort, Moment, PrivacyLedger
from wardround.client.policy import DataSource, SiteConfig
from wardround.client.training import plain_update, private_update
from wardround.client.training.supervised import working_model, working_shapes
from wardround.common.devices import device
from wardround.common.errors import DataRefused, OrderRefused, PlanRefused
from wardround.common.messages import (
    Farewell,
    LookFacts,
    OrderFacts,
    Present,
    RollCall,
    Settled,
    TallyFacts,
    UpdateFacts,
)
from wardround.common.plan import SignedText, StudyPlan
from wardround.common.tasks import Records, Task, task_of
from wardround.common.tasks.looks import look_of
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
        self._parted: dict[tuple[str, float], tuple[Records, Records]] = {}  # by task and share set aside
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
        self._parted.clear()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def shapes(self, study: SignedText) -> Shapes:
        """The shapes a model of an admitted study must have; built here, not taken from the coordinator."""
        self._admit(study)
        return working_shapes(task_of(study.plan), study.plan.model, self._device)

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

    def evaluate(self, study: SignedText, look: LookFacts, weights: Weights) -> TallyFacts:
        """How a model does on the patients set aside, who are never trained on, all of them summed up.

        Raises:
            WardroundError: any refusal; with [privacy] always, because the sums carry no noise.
        """
        if look.study != study.digest:
            raise OrderRefused("the look belongs to another study plan")
        self._admit(study)
        plan, site = study.plan, self.config.site
        if plan.validation is None or plan.privacy is not None:
            raise OrderRefused("the plan does not allow to look at any patient")
        if not (1 <= look.round <= plan.rounds and plan.looks_after(look.round)):
            raise OrderRefused(f"the plan has no look after round {look.round}")
        task = task_of(plan)
        records = self._parts(plan, task)[1]
        if records.patients < self.config.allow.min_evaluated:
            detail = f"{records.patients} patients are set aside; min_evaluated = {self.config.allow.min_evaluated}"
            raise DataRefused("too few patients are set aside for validation", detail=detail)
        judge = replace(task, judge=lambda outputs, label: task.judge(outputs.cpu(), label.cpu()))
        model = working_model(task, plan.model, self._device)
        found = judge.scores(model, {name: tensor.to(self._device) for name, tensor in weights.items()}, records)
        return TallyFacts(site, look.study, look.run, look.round, look_of(task, plan).pack(found))

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
        task = task_of(plan)
        if (size := task.size(plan.model)) > self.config.allow.parameters:
            most = self.config.allow.parameters
            raise PlanRefused(f"{site} does not take part: a model of {size:,} numbers is larger than the {most:,} allowed")
        model = working_model(task, plan.model, self._device)
        if plan.privacy is None:
            refuse_coupled(model)
        else:  # on nobody's records, so that nothing of it can happen after a ledger entry
            preflight(task.private_part(model), task.loss, task.blank(1).to(self._device))
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
        task = task_of(plan)
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
        task = task_of(plan)
        records = self._training_records(plan, task)
        if not len(records):
            raise DataRefused("there is no record to train on")
        update = plain_update(
            task,
            working_model(task, plan.model, self._device),
            {name: tensor.to(self._device) for name, tensor in weights.items()},
            records,
            local=plan.local,
            seed=plan.seed,
            site=self.config.site,
            round=order.round,
        )
        return {name: tensor.cpu() for name, tensor in update.items()}

    def _training_records(self, plan: StudyPlan, task: Task) -> Records:
        if plan.validation is not None:
            return self._parts(plan, task)[0]
        if plan.task not in self._records:
            records, _ = open_records(self._source(plan), task)
            self._records[plan.task] = records.to(self._device)
        return self._records[plan.task]

    def _parts(self, plan: StudyPlan, task: Task) -> tuple[Records, Records]:
        """Records to train on and records set aside, of a plan with [validation]; no patient is in both."""
        assert plan.validation is not None
        key = plan.task, plan.validation.share
        if key not in self._parted:
            training, aside = open_parted(self._source(plan), task, plan.validation.share)
            self._parted[key] = training.to(self._device), aside.to(self._device)
        return self._parted[key]

    def _source(self, plan: StudyPlan) -> DataSource:
        return self.config.data[plan.task]

    def _facts_of(self, order: OrderFacts) -> UpdateFacts:
        # after the answer is on disk: a copy of the ledger from before it is older than what the coordinator then knows
        return self._facts(order, ledger_head=self.ledger.head, steps_spent=self.ledger.spent(order.run))

    def _facts(self, order: OrderFacts, *, ledger_head: str, steps_spent: int) -> UpdateFacts:
        return UpdateFacts(self.config.site, order.study, order.run, order.round, order.attempt, ledger_head, steps_spent)
