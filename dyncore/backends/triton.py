"""The triton backend (bootstrap)."""
