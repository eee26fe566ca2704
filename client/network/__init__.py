"""A hospital on the network: one resident process that calls out, runs what was approved, and answers under its own name."""
