"""What the coordinator and the hospitals agree on: plans, tasks, models, messages, privacy arithmetic.

Imports nothing else of wardround.
"""

from importlib.metadata import version

__version__ = version("wardround")
