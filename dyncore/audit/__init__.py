"""dyncore.audit: what dyncore could do for a model that is there, and what the dynamic layers in it do.

`python -m dyncore audit package.module:factory` on the command line, `audit(model, inputs)` in code. Floor 5.
"""

from dyncore.audit.auditing import audit
from dyncore.audit.findings import Audit, Layer

__all__ = ["Audit", "Layer", "audit"]
