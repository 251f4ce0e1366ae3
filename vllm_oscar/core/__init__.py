# SPDX-License-Identifier: Apache-2.0
"""The format: presets, page layout, reference codec. Imports torch, not vLLM, and nothing of ``ops`` or ``engine``."""

from vllm_oscar.core.config import PRESETS, OscarConfig, get_preset
from vllm_oscar.core.format import PageFormat
from vllm_oscar.core.reference import decode_page, encode_page

__all__ = ["PRESETS", "OscarConfig", "PageFormat", "decode_page", "encode_page", "get_preset"]
