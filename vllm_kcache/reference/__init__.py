# SPDX-License-Identifier: Apache-2.0
"""The definition of each step in plain torch. On a machine without a GPU it also runs the engine.

Nothing here checks its arguments: shapes are those of the engine's own tensors.
"""
