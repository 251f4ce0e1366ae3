# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: vLLM calls :func:`register` in every process."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.oscar")


def register() -> None:
    """Teach this process's vLLM the OScaR dtypes, backends and cache specs. Idempotent.

    An unsupported vLLM is left untouched, with one error in the log, so that it still
    serves everything else.
    """
    from vllm_oscar.engine import compat

    problem = compat.unsupported_version()
    if problem:
        logger.error(problem)
        return
    compat.apply()
