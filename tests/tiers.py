"""The two tiers of the suite: what `make test` runs, and what waits for `make test-exhaustive`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def tiered(cases: Iterable[Any], is_fast: Callable[..., bool]) -> list[Any]:
    """Parameters of a test, those that only the exhaustive tier runs marked so.

    Args:
        cases: values, or tuples of values for a test of several parameters.
        is_fast: called with the values of a case; whether the fast tier runs it.
    """
    parameters = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        parameters.append(pytest.param(*values, marks=() if is_fast(*values) else pytest.mark.exhaustive))
    return parameters
