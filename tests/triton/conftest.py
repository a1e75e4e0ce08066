"""Makes Triton interpret its kernels on the CPU, where nothing has imported it yet."""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
