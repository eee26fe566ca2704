"""Mail on its way to a site: what a broken line swallowed is handed over again.

Flower takes a message out of its box as it answers a call for mail, and never looks at it again. A line that broke in that
moment, or was dead without telling, would have cost the order. So the answer is kept here until the site shows that it has
it: the first thing it does with mail is to ask for a part of it.
"""

from __future__ import annotations

from wardround.server.network.asgi import Answer

_SAYS_NOTHING = frozenset({"/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat"})  # of mail that was given


class Letters:
    """The newest call for mail of each site, and the mail it was given."""

    def __init__(self) -> None:
        self._newest: dict[str, object] = {}
        self._given: dict[str, Answer] = {}

    def call(self, site: str) -> object:
        """A site calls for mail; an older call of its own is over, whatever became of the line it came on."""
        self._newest[site] = mine = object()
        return mine

    def is_over(self, site: str, call: object) -> bool:
        """Whether the site has called again since."""
        return self._newest.get(site) is not call

    def given(self, site: str) -> Answer | None:
        """Mail that the site was given before, and may not have."""
        return self._given.get(site)

    def give(self, site: str, mail: Answer) -> None:
        """Mail goes to the site."""
        self._given[site] = mail

    def heard(self, site: str, room: str) -> None:
        """The site asks for something; unless that is mail, it has what it was given, or was started anew."""
        if room not in _SAYS_NOTHING:
            self._given.pop(site, None)
