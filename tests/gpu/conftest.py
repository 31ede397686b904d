"""cuBLAS is deterministic only with a workspace of its own, named before its first call; torch insists on it."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
