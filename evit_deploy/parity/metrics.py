"""How far two outputs are apart, row by row, in float64.

Legend: N rows (images) of a batch, C numbers per row (all further dimensions flattened); r a reference row, c the
candidate's, e = c - r, rms(x) = sqrt(mean(x^2)).

    max_abs   max |e|
    max_rel   max |e| / max(|r|, rms(r)): the floor rms(r) keeps a logit that happens to be near zero from deciding
    rms_rel   rms(e) / rms(r)
    cosine    <r, c> / (|r| |c|)
    psnr_db   20 log10(max |r| / rms(e)); NaN where e is exactly zero (then rms_rel is 0)
    top1      the class that c ranks first is a best class of r, ties within the tolerance counted as ties
    top5      so for the five first of c (all of them where C < 5)

A row with NaN or Inf on either side has NaN for every distance, and no comparison in this package lets NaN pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class RowMetrics:
    """One array of N values per metric, in the order of the batch; nan and inf count the candidate's elements."""

    max_abs: np.ndarray
    max_rel: np.ndarray
    rms_rel: np.ndarray
    cosine: np.ndarray
    psnr_db: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    nan: np.ndarray
    inf: np.ndarray

    def __len__(self) -> int:
        return len(self.rms_rel)

    @staticmethod
    def concatenate(parts: Sequence[RowMetrics]) -> RowMetrics:
        """The rows of several batches one after another."""
        return RowMetrics(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(RowMetrics)))


def as_rows(output: np.ndarray) -> np.ndarray:
    """[N, ...] of any float dtype -> [N, C] float64."""
    return np.asarray(output).astype(np.float64).reshape(output.shape[0], -1)


def rms(rows: np.ndarray) -> np.ndarray:
    """Root mean square over the last dimension."""
    root: np.ndarray = np.sqrt(np.mean(np.square(rows), axis=-1))
    return root


def compare_rows(reference: np.ndarray, candidate: np.ndarray, *, tie_rel: float = 0.0) -> RowMetrics:
    """The metrics of every row.

    Args:
        reference: [N, ...] with N > 0 and at least one element per row.
        candidate: same shape.
        tie_rel: the max_rel tolerance. A candidate within it may rank two classes in either order when their reference
            values are closer than twice the permitted error, so such classes count as tied in top1 and top5.

    Raises:
        ValueError: the shapes differ or there is nothing to compare.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: {reference.shape=}, {candidate.shape=}")
    if reference.size == 0 or reference.ndim == 0:
        raise ValueError(f"nothing to compare: {reference.shape=}")
    r, c = as_rows(reference), as_rows(candidate)
    finite = np.isfinite(r).all(axis=1) & np.isfinite(c).all(axis=1)
    with np.errstate(all="ignore"):
        error = np.where(finite[:, None], c - r, np.nan)
        scale = rms(r)
        floor = np.maximum(np.abs(r), scale[:, None])
        error_rms = rms(error)
        cosine = (r * c).sum(axis=1) / (np.linalg.norm(r, axis=1) * np.linalg.norm(c, axis=1))
        psnr = 20.0 * np.log10(np.abs(r).max(axis=1) / error_rms)
        margin = 2.0 * tie_rel * np.maximum(np.abs(r).max(axis=1), scale)
        return RowMetrics(
            max_abs=np.abs(error).max(axis=1),
            max_rel=(np.abs(error) / floor).max(axis=1),
            rms_rel=error_rms / scale,
            cosine=np.where(finite, np.clip(cosine, -1.0, 1.0), np.nan),
            psnr_db=np.where(np.isfinite(psnr), psnr, np.nan),
            top1=finite & _top_k_agrees(r, c, 1, margin),
            top5=finite & _top_k_agrees(r, c, 5, margin),
            nan=np.isnan(c).sum(axis=1),
            inf=np.isinf(c).sum(axis=1),
        )


def _top_k_agrees(r: np.ndarray, c: np.ndarray, k: int, margin: np.ndarray) -> np.ndarray:
    """Whether the reference value of each of the candidate's k first classes reaches the k-th best, less the margin."""
    k = min(k, r.shape[1])
    chosen = np.argpartition(-c, k - 1, axis=1)[:, :k]
    kth_best = -np.partition(-r, k - 1, axis=1)[:, k - 1]
    agrees: np.ndarray = (np.take_along_axis(r, chosen, axis=1) >= (kth_best - margin)[:, None]).all(axis=1)
    return agrees
