# SPDX-License-Identifier: Apache-2.0
"""`vllm-kcache plan`: what fits and how fast it decodes, without vLLM and without a GPU.

`shape` reads a config.json, `memory` says what fits, `cost` how long a step takes, `plan` puts them
together and `report` prints the answer. The model and how well it fits measurements: docs/plan.md.
"""
