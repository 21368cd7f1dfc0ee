# SPDX-License-Identifier: Apache-2.0
from hypothesis import settings

# The same examples in every run: a red test stays red until its cause is mended.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("repeatable")
