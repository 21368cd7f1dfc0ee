# SPDX-License-Identifier: Apache-2.0
"""Entry point of the plugin: what it adds to vLLM, once per process.

Without `--kv-backend kcache` (or the same in Python) nothing in vLLM behaves differently: the
wraps below then call straight through, and no backend is registered.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Entry point `vllm.general_plugins`. Idempotent; called in every vLLM process.

    Raises:
        RuntimeError: The installed vLLM lacks something that the plugin patches.
    """
    from vllm_kcache.integration import args, layers, pools

    args.install()
    layers.install()
    pools.install()
    # vLLM sets up its own loggers only; ours follow them, whatever it does to them later.
    logging.getLogger("vllm_kcache").parent = logging.getLogger("vllm")
