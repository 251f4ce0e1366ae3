# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: vLLM calls :func:`register` in every process."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("vllm.oscar")


def register() -> None:
    """Teach this process's vLLM the OScaR dtypes, backends and cache specs. Idempotent.

    Never raises: a vLLM that is not supported, or lacks something that we need, still
    serves everything else, and refuses our dtypes with a sentence.
    """
    try:
        from vllm_oscar.engine import compat

        problem = compat.unsupported_version()
        if not problem:
            compat.apply()
    except Exception as error:  # here a changed vLLM must not stop those who do not use our dtypes
        problem = str(error)
    if problem:
        _refuse(problem)
    show_refusals_alone()


def _refuse(problem: str) -> None:
    """Refuse our dtypes with ``problem`` when they are chosen; if not even that works, say so now."""
    try:
        from vllm_oscar.engine import compat

        compat.refuse_dtypes(problem)
    except Exception as error:
        logger.error("%s (nor could the dtype be registered: %s)", problem, error)
    else:
        logger.warning(problem)


def show_refusals_alone() -> None:
    """Print an uncaught refusal as its sentence; the traceback, which helps nobody, at debug level."""
    from vllm_oscar.engine.refusal import UnsupportedByOscar

    previous = sys.excepthook
    if getattr(previous, "_oscar", False):
        return

    def excepthook(kind, error, traceback) -> None:
        if not isinstance(error, UnsupportedByOscar) or logging.getLogger("vllm").isEnabledFor(logging.DEBUG):
            return previous(kind, error, traceback)
        print(f"vllm-oscar: {error}", file=sys.stderr)

    excepthook._oscar = True
    sys.excepthook = excepthook
