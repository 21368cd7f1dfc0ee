# SPDX-License-Identifier: Apache-2.0
"""Launches that begin before the launch before them has ended (programmatic dependent launch).

The kernels of a decode step are short in a small batch, and the next one's start would wait for the
last thread block of the one before, its memory, and a launch. A dependent launch starts as soon as
all thread blocks of the launch before have said so or ended, and waits for its memory where it
needs it. Each kernel of the chain waits for the one before it, so whatever follows one of them
follows all. CUDA C++ Programming Guide, "Programmatic Dependent Launch"; compute capability 9.0 and
newer.
"""

from __future__ import annotations

from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait"]
