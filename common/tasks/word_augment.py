"""Texts with words left out: what a text is about is told by more than one of its words.

A network that must do with a part of the words learns from all of them: the word dropout of Iyyer et al. 2015,
https://aclanthology.org/P15-1162. It is what keeps an embedding of many words, most of them rare, from learning texts by
heart.
"""

from __future__ import annotations

from dataclasses import replace

from wardround.common.tasks.base import Chance, Records

_LEFT_OUT = 0.7  # the chance of each word


def fewer_words(records: Records, chance: Chance) -> Records:
    """`tokens` (records, length) with each word left out at a chance of 0.7: 0 is in its place, and no other word moves.

    One word of a text always stays, so that a text does not become an empty one.
    """
    tokens = records.fields["tokens"]
    draws = chance(tokens.numel()).view(tokens.shape).to(tokens.device)
    largest = draws.where(tokens != 0, 0).amax(1, keepdim=True)  # of the words that there are
    kept = draws >= largest.clamp(max=_LEFT_OUT)
    return replace(records, fields={**records.fields, "tokens": tokens * kept})
