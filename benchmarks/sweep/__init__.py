"""`bitnet sweep`: many training runs from one spec, with their gaps to the float baseline.

spec.py      which runs a spec asks for       run.py        trains what is left of them
summary.py   means, gaps, curves              table.py plot.py   for people
"""
