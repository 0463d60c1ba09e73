"""The backends that verify, bench and evaluate know, by name; importing this package imports no runtime."""

from __future__ import annotations

from evit_deploy.backends.backend import NO_TRANSFERS, TRANSFERS_INCLUDED, Backend, BackendContext
from evit_deploy.backends.registry import (
    BACKENDS,
    REFERENCE,
    TENSORRT,
    TORCH_HALF,
    VERIFY,
    backend_runner,
    deployable_backends,
    find_backend,
    resolve_backends,
)

__all__ = [
    "BACKENDS",
    "NO_TRANSFERS",
    "REFERENCE",
    "TENSORRT",
    "TORCH_HALF",
    "TRANSFERS_INCLUDED",
    "VERIFY",
    "Backend",
    "BackendContext",
    "backend_runner",
    "deployable_backends",
    "find_backend",
    "resolve_backends",
]
