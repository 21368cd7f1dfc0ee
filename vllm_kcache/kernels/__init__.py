# SPDX-License-Identifier: Apache-2.0
"""The steps on a GPU: write, score and attend in Triton, select and fetch in the extension (csrc/).

The modules carry the names of the steps. A step is defined in `vllm_kcache.reference`.
"""
