# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM. No other folder of the package imports it."""
