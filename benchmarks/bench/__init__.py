"""`bitnet bench`: tokens a second beside what the machine allows, against other engines, in one interleaved run.

command.py    what the verb does                   plan.py       which tests: lists that cross-multiply
contenders.py who can run, and what it needs       measure.py    turns, medians, refusals
worker.py     the child: loads once, runs a test   process.py    the parent's end of it
runner.py     a contender within its budget
ours.py dense.py llama.py meter.py                 what a child runs: contenders, and the machine's limits
limits.py     bytes and multiply-adds a token      machine.py    what the figures were measured on
table.py plot.py                                   for people: md, csv; roofline and comparison
"""
