"""What `make gpu` runs on a machine with a CUDA device: tests, measurements beside rivals, bars.

`__main__` is the command and its time budget, `processes` what runs beside it, `cases` what is measured, `ways` how
each case is computed, `reference` what is right, `measure` the timing, `bars` the verdicts.
"""
