"""Faults planted in copies of the sources, each of which the fast tier of the suite must catch: `make mutants`.

The suite as a whole says that the code is right; this says that the suite would notice if it were not.
"""
