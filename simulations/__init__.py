"""Many hospitals on one machine: the real coordinator and the real client, without a network."""

from pathlib import Path

STUDIES = Path(__file__).parent / "studies"
SITES = Path(__file__).parent / "sites"
