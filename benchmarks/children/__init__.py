"""Child processes of the benchmarks: how one is started, limited, pinned, asked and ended.

child.py      what runs in the child: loads a script, answers questions; needs the standard library only
process.py    the parent's end: `Child`
llama.py      llama.cpp in a child, in whichever Python has it
builds.py     whether a Python has llama.cpp, and what its build lacks
"""
