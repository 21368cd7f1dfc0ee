# SPDX-License-Identifier: Apache-2.0
"""Launches that begin before the launch before them has ended (programmatic dependent launch).

In a small batch the kernels of a decode step are short, and much of the time goes between them. A
dependent launch starts as soon as all thread blocks of its predecessor have triggered it or ended,
and waits where it needs the predecessor's memory. Every kernel of the chain waits for its
predecessor, so what follows one of them follows all. CUDA C++ Programming Guide, "Programmatic
Dependent Launch"; compute capability 9.0 and newer.
"""

from __future__ import annotations

from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait"]
