"""Every refusal of wardround, in one tree.

    WardroundError
    ├── ConfigError          a file is wrong; all its problems at once
    ├── PlanRefused          a site's policy does not admit this plan
    ├── BudgetExhausted      the ledger has no privacy left for it
    ├── LedgerBroken         the ledger's chain is cut, edited or older than what the coordinator saw
    ├── DataRefused          records do not fit the task's schema
    ├── OrderRefused         an order of the coordinator contradicts an earlier one, or cannot be read
    │   └── RoundTaken       the round was begun from another model; a new attempt may be ordered
    ├── UpdateRefused        a site's reply is not an update of this round
    ├── SumAborted           a secure sum was given up; its secrets are gone
    ├── CheckpointBroken     a checkpoint cannot be trusted
    ├── TrustRefused         a certificate, a revocation list or an enrolment is not to be trusted
    │   └── SignatureRefused a signed text is not what its signer signed, or cannot be read
    ├── AuditBroken          an audit log is cut, edited or rewritten
    ├── VaultBroken          a sealed file cannot be opened, or its key cannot
    ├── LinkRefused          the coordinator, or the gate before it, said no
    └── StudyStopped         the study ended before its last round, with a reason

The text of a WardroundError may leave a hospital, so it never holds a patient's value, a path or another library's
message; what only the site may read goes into `detail`. A ConfigError is the exception: it quotes the file for the person
who wrote it, and never travels; neither does a DataRefused, which says something about records.
"""

from __future__ import annotations


class WardroundError(Exception):
    """A refusal in wardround's own words; `str(error)` is safe to send, `error.detail` stays at the site."""

    def __init__(self, text: str, *, detail: str = "") -> None:
        super().__init__(text)
        self.detail = detail


class ConfigError(WardroundError):
    """A file is not what it should be; the text lists every problem in it."""


class PlanRefused(WardroundError):
    """A site's policy does not admit this plan."""


class BudgetExhausted(WardroundError):
    """The ledger has no privacy left for what was asked."""


class LedgerBroken(WardroundError):
    """The ledger's chain is cut, edited, or older than what the coordinator has seen of it."""


class DataRefused(WardroundError):
    """Records do not fit the task's schema; the text counts, the detail (site only) names files and columns."""


class OrderRefused(WardroundError):
    """An order of the coordinator contradicts an earlier one, or cannot be read."""


class RoundTaken(OrderRefused):
    """The round was already begun from another model; the plan may allow a new attempt, which is a new charge."""


class UpdateRefused(WardroundError):
    """A site's reply is not an update of this round; it is dropped and the round goes on."""


class SumAborted(WardroundError):
    """A secure sum was given up: somebody did not follow it, or too few were left. Its secrets are gone."""


class CheckpointBroken(WardroundError):
    """A checkpoint cannot be read or belongs to another study."""


class TrustRefused(WardroundError):
    """A certificate, a revocation list or an enrolment is not to be trusted; the detail names the file."""


class SignatureRefused(TrustRefused):
    """A signed text is not what its signer signed, or cannot be read."""


class AuditBroken(WardroundError):
    """An audit log is cut, edited or rewritten."""


class VaultBroken(WardroundError):
    """A sealed file cannot be opened, or its key cannot."""


class LinkRefused(WardroundError):
    """The coordinator, or the gate before it, said no."""


class StudyStopped(WardroundError):
    """The study ended before its last round."""
