"""How a site learns: one file a kind of learner."""

from wardround.client.training.supervised import plain_update, private_update

__all__ = ["plain_update", "private_update"]
