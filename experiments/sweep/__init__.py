"""`eggroll sweep`: many runs of a driver, from a file that says what varies.

spec (the file) → space (what is drawn) → plan (runs, and which are one program) → worker (trains some of
them) → processes, arrays (where workers run) → records (what is on disk) → status, outcome, importance.
"""
