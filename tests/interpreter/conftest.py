"""Kernels run on CPU tensors here, in a process with TRITON_INTERPRET=1 from its start: see tests/test_interpreter.py."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
