"""Plugs into the tools people use. Each module imports its tool when it is first called, not before.

Floor 5.
"""

from dyncore.integrations import transformers

__all__ = ["transformers"]
