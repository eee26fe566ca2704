"""The coordinator: asks, checks, adds up, steps, writes down. Imports wardround.common only."""
