"""The coordinator on a network: Flower's SuperLink behind a gate, studies as processes, and a grid that hides the rest."""
