"""How like two sets of images are: as wholes, and each image to its nearest in the other set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_AT_ONCE = 256  # images


def frechet(one: Tensor, other: Tensor) -> float:
    """The squared Frechet distance between the normal distributions that fit two sets of features, (records, features).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); with the features of an Inception network it is the FID of Heusel et al. 2017,
    https://arxiv.org/abs/1706.08500. With other features the figures of two studies cannot be compared.
    """
    one, other = one.double(), other.double()
    covariance, covariance_other = torch.cov(one.T), torch.cov(other.T)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # the trace of a product's root is that of this symmetric matrix
    shared = torch.linalg.eigvalsh(root @ covariance_other @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return float((apart + covariance.trace() + covariance_other.trace() - 2 * shared).clamp(min=0))


def nearest(image: Tensor, among: Tensor) -> Tensor:
    """Each image's distance to the nearest of `among`: the root of the mean squared difference of a value.

    (images, ...) and (others, ...) -> (images,).
    """
    flat = among.flatten(1)
    parts = [torch.cdist(part.flatten(1), flat).amin(1) for part in torch.split(image, _AT_ONCE)]
    return torch.cat(parts) / math.sqrt(flat.shape[1])
