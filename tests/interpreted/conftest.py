"""Every test in this folder runs Triton kernels in Triton's interpreter.

Triton's own functions, such as sums, are interpreted only if the variable is set before Triton is imported,
so `tests/unit/test_in_interpreter.py` runs this folder in a process of its own.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
