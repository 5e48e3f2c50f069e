"""`bitnet bench`: tokens per second beside what the machine allows, and beside other engines in one interleaved run.

command.py      what the verb does                    plan.py         which tests: lists that cross-multiply
contenders.py   which engines can run, their needs    series.py       the tests of one contender within its budget
measure.py      the rounds                            rows.py         medians, and the limit of each row
interleaving.py contenders in turn, quartiles         machine.py      what the figures were measured on
ours.py dense.py meter.py                             what children run: engines, and the machine's limits
limits.py       bytes and multiply-adds per token     device_meter.py bandwidth and peaks of a device
random_model.py models of any shape, to be measured
table.py plot.py                                      for people: Markdown, CSV; roofline and comparison
"""
