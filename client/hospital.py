"""A hospital in one object: its file, its ledger, its records, and what it does in a round.

The order of things in `train`, `count` and `evaluate` is the guarantee: admit, reserve, mark, and only then open the records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import nn

from wardround.client.data import open_parted, open_records
from wardround.client.dp import Coins, OsCoins, preflight, refuse_coupled
from wardround.client.ledger import Cohort, Moment, PrivacyLedger
from wardround.client.policy import DataSource, SiteConfig
from wardround.client.queries import class_vectors, loss_vectors, summed
from wardround.client.training import plain_update, private_update
from wardround.client.training.supervised import working_model, working_shapes
from wardround.common.devices import device
from wardround.common.errors import DataRefused, OrderRefused, PlanRefused
from wardround.common.messages import (
    CountedFacts,
    CountFacts,
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
from wardround.common.start import taken_in
from wardround.common.tasks import Records, Task, task_of
from wardround.common.tasks.looks import NoisedLook, look_of
from wardround.common.tasks.of_plan import unpacked
from wardround.common.weights import Shapes, Weights, digest, rounded

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
        """The shapes a round's model of an admitted study must have; built here, not taken from the coordinator."""
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
        _refuse_another(order.study, study, "order")
        self._admit(study)
        plan = study.plan
        attempts = plan.privacy.max_attempts if plan.privacy else 1
        if not 1 <= order.round <= plan.rounds or not 1 <= order.attempt <= attempts:
            raise OrderRefused(f"the plan has no round {order.round}, attempt {order.attempt}")
        weights = taken_in(self._model(plan), plan.model, weights)
        if plan.privacy is None:
            update = self._learn_plainly(plan, order, weights)
            return self._facts(order, ledger_head="", steps_spent=0), update
        return self._train_privately(study, order, weights)

    def evaluate(self, study: SignedText, look: LookFacts, weights: Weights) -> TallyFacts:
        """How a model does on the patients set aside, who are never trained on, all of them summed up.

        With [privacy] a look is charged like a round: reserve -> mark -> open the records -> noise -> store the answer.

        Raises:
            WardroundError: any refusal.
        """
        _refuse_another(look.study, study, "look")
        self._admit(study)
        plan, site = study.plan, self.config.site
        if plan.validation is None:
            raise OrderRefused("the plan does not allow to look at any patient")
        if not (1 <= look.round <= plan.rounds and plan.looks_after(look.round)):
            raise OrderRefused(f"the plan has no look after round {look.round}")
        task, weights = self._task(plan, look.shares), taken_in(self._model(plan), plan.model, weights)
        if plan.privacy is not None:
            sums = self._look_privately(study, task, look, weights)
            return TallyFacts(site, look.study, look.run, look.round, sums, self.ledger.head)
        records = self._parts(plan, task)[1]
        if records.patients < self.config.allow.min_evaluated:
            detail = f"{records.patients} patients are set aside; min_evaluated = {self.config.allow.min_evaluated}"
            raise DataRefused("too few patients are set aside for validation", detail=detail)
        judge = replace(task, judge=lambda outputs, label: task.judge(outputs.cpu(), label.cpu()))
        wanted = look_of(task, plan)
        assert not isinstance(wanted, NoisedLook)
        found = judge.scores(self._model(plan), self._here(weights), records)
        return TallyFacts(site, look.study, look.run, look.round, wanted.pack(found))

    def count(self, study: SignedText, asked: CountFacts) -> CountedFacts:
        """How the patients trained on fall into classes; with [privacy] noised, and charged once a run.

        Raises:
            WardroundError: any refusal.
        """
        _refuse_another(asked.study, study, "question")
        self._admit(study)
        plan, site = study.plan, self.config.site
        if not plan.loss.counts:
            raise OrderRefused("the plan has no classes counted")
        task = task_of(plan)
        if (noised := plan.counts_query()) is not None:
            sums = self._charged(
                study, Moment(study.digest, asked.run, 0, 0), model="", head=asked.ledger_head,
                answer=lambda: summed(
                    class_vectors(self._training_records(plan, task), task.schema.classes),
                    noise_multiplier=noised.noise_multiplier, coins=self._coins_for(site, 0),
                ),
            )  # fmt: skip
            return CountedFacts(site, asked.study, asked.run, self.ledger.head, sums)
        records = self._training_records(plan, task)
        if records.patients < self.config.allow.min_evaluated:
            detail = f"{records.patients} patients are trained on; min_evaluated = {self.config.allow.min_evaluated}"
            raise DataRefused("too few patients to count their classes", detail=detail)
        return CountedFacts(site, asked.study, asked.run, "", summed(class_vectors(records, task.schema.classes)))

    def settle(self, study: SignedText, farewell: Farewell) -> Settled:
        """End a study: give back what was not spent."""
        _refuse_another(farewell.study, study, "farewell")
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
        for rule in self.config.own_rules(plan):
            if rule.refusal:
                raise PlanRefused(f"{site} does not take part: {rule.refusal}")
        task = task_of(plan)
        model = self._model(plan)
        if plan.privacy is None:
            refuse_coupled(model)
        else:  # on nobody's records, so that nothing of it can happen after a ledger entry
            preflight(task.private_part(model), task.loss, task.blank(1).to(self._device))
        self._admitted.add(study.digest)

    def _reserve(self, study: SignedText, run: str, head: str) -> None:
        """The whole cost of a run on disk, unless it is there already."""
        plan, allow = study.plan, self.config.allow
        assert allow.epsilon_lifetime is not None  # `admit` refuses otherwise
        self.ledger.must_hold(head)
        self.ledger.reserve(
            Cohort(self._source(plan).cohort, allow.epsilon_lifetime, allow.delta),
            study=study.digest,
            name=plan.name,
            run=run,
            steps=plan.noised_steps(plan.noise_multiplier()),
            steps_per_round=plan.local.steps,
            counts=plan.counts_query(),
            looks=plan.looks_query(),
        )

    def _charged(self, study: SignedText, moment: Moment, *, model: str, head: str, answer: Callable[[], bytes]) -> bytes:
        """What was answered at `moment`, or what `answer` makes of the records once their cost is on disk."""
        self._reserve(study, moment.run, head)
        stored = self.ledger.mark(moment, model=model)
        if stored is None:
            stored = answer()
            self.ledger.answer(moment, reply=stored)
        return stored

    def _look_privately(self, study: SignedText, task: Task, look: LookFacts, weights: Weights) -> bytes:
        plan = study.plan
        wanted = look_of(task, plan)
        assert isinstance(wanted, NoisedLook)
        return self._charged(
            study, Moment(study.digest, look.run, look.round, 0), model=_seen(weights, look.shares), head=look.ledger_head,
            answer=lambda: summed(
                loss_vectors(wanted, task, self._model(plan), self._here(weights), self._parts(plan, task)[1]),
                # another key of a test's coins than the round's own
                noise_multiplier=wanted.noise_multiplier, coins=self._coins_for(self.config.site, -look.round),
            ),
        )  # fmt: skip

    def _train_privately(self, study: SignedText, order: OrderFacts, weights: Weights) -> tuple[UpdateFacts, Weights]:
        plan, privacy, ledger = study.plan, study.plan.private(), self.ledger
        task = self._task(plan, order.shares)
        self._reserve(study, order.run, order.ledger_head)
        moment = Moment(study.digest, order.run, order.round, order.attempt)
        stored = ledger.mark(moment, model=_seen(weights, order.shares))
        if stored is not None:
            return self._facts_of(order), safetensors.torch.load(stored)
        records = self._training_records(plan, task)  # from here on patients are read; their cost is on disk
        update = private_update(
            task,
            self._model(plan),
            self._here(weights),
            records,
            local=plan.local,
            privacy=privacy,
            noise_multiplier=plan.noise_multiplier(),
            declared_patients=plan.sites[self.config.site],
            coins=self._coins_for(self.config.site, order.round),
        )
        update = rounded({name: tensor.detach().cpu().contiguous() for name, tensor in update.items()}, plan.update_numbers)
        ledger.answer(moment, reply=safetensors.torch.save(update))
        return self._facts_of(order), update

    def _learn_plainly(self, plan: StudyPlan, order: OrderFacts, weights: Weights) -> Weights:
        task = self._task(plan, order.shares)
        records = self._training_records(plan, task)
        if not len(records):
            raise DataRefused("there is no record to train on")
        update = plain_update(
            task,
            self._model(plan),
            self._here(weights),
            records,
            local=plan.local,
            seed=plan.seed,
            site=self.config.site,
            round=order.round,
        )
        return rounded({name: tensor.cpu() for name, tensor in update.items()}, plan.update_numbers)

    def _model(self, plan: StudyPlan) -> nn.Module:
        return working_model(task_of(plan), plan.model, self._device)

    def _task(self, plan: StudyPlan, shares: bytes) -> Task:
        """The plan's task with its loss, of classes as common as the coordinator says where they were counted."""
        return task_of(plan, unpacked(shares, task_of(plan), plan))

    def _here(self, weights: Weights) -> Weights:
        return {name: tensor.to(self._device) for name, tensor in weights.items()}

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


def _seen(weights: Weights, shares: bytes) -> str:
    """What a round is trained or looked at from, in short."""
    return digest(weights) + (f"/{shares.hex()}" if shares else "")


def _refuse_another(told: str, study: SignedText, what: str) -> None:
    if told != study.digest:
        raise OrderRefused(f"the {what} belongs to another study plan")
