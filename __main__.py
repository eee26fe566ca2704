"""`python -m wardround` is the `wardround` command."""

from wardround.common.cli import main

main()
