"""One hospital: its policy, its ledger, its data, its training. Imports wardround.common only."""
