"""A finished study as two files: report.json for machines, report.html for an ethics board. Imports wardround.common only.

What the keys of report.json mean is written in docs/report.md.
"""

from wardround.server.report.render import to_html, to_json, write_report
from wardround.server.report.schema import (
    VERSION,
    ClassCounts,
    Figure,
    Outcome,
    Report,
    Results,
    RoundFacts,
    Seconds,
    Seeds,
    Sheet,
    SiteFacts,
    SitePrivacy,
    SiteResults,
    Spread,
    Study,
    Validation,
)

__all__ = [
    "VERSION",
    "ClassCounts",
    "Figure",
    "Outcome",
    "Report",
    "Results",
    "RoundFacts",
    "Seconds",
    "Seeds",
    "Sheet",
    "SiteFacts",
    "SitePrivacy",
    "SiteResults",
    "Spread",
    "Study",
    "Validation",
    "to_html",
    "to_json",
    "write_report",
]
