"""What wardround costs beside a plain loop: run from the repository's root, `python -m benchmarks.simulation`."""
