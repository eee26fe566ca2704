"""Why a model says what it says of a hospital's own records: worked out at the site, shown at the site, never sent.

    study.py         which plan, model and records: of a run folder, or of a real hospital's files
    choice.py        which held-out records are shown
    answers.py       what the model answers, and the one number that is explained
    attributions.py  what that number comes from, by captum
    views.py         the same in the words of the task: columns, variables, letters, words, pixels
    pages.py         one page that only its owner may read

Nothing here leaves the hospital, so nothing here is charged to the ledger; and no guarantee of a study covers it.
"""

from wardround.client.interpret.command import Request, explain

__all__ = ["Request", "explain"]
