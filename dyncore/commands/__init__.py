"""The commands of `dyncore`, one file each: add(commands) describes it to argparse, and its `run` is called.

Floor 5. dyncore/cli.py puts them together.
"""
