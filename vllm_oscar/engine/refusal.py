# SPDX-License-Identifier: Apache-2.0
"""How OScaR refuses: an exception whose message is one sentence, with the setting to change."""

OTHER_MODEL = "choose another model, or serve this model with --kv-cache-dtype auto"
"""The way out where no setting helps."""


class UnsupportedByOscar(Exception):
    """The requested combination cannot be served with an OScaR KV cache.

    Not a ``ValueError``: pydantic would wrap that in a message about the whole configuration.
    """
