"""`bitnet compare`: every method to shrink a model, on one trained pair of runs.

command.py   what the verb does                            pair.py      the runs that are compared
method.py registry.py                                      what a method is, and all of them
own.py torchao_methods.py gptq.py gguf_methods.py          the methods
artifact.py  the file that a method makes                  models.py    one interface to those files
jobs.py      what runs in a child                          measure.py   the formulas
table.py plot.py                                           for people
"""
