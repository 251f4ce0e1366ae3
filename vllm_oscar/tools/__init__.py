# SPDX-License-Identifier: Apache-2.0
"""The command ``vllm-oscar``. Nothing else imports this package."""
