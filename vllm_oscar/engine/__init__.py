# SPDX-License-Identifier: Apache-2.0
"""vLLM's side: plugin, patches, checks, scheduler classes, attention backend. May import everything but ``tools``."""
