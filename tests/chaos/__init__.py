"""Chaos: kill a precompute job anywhere, let it go on, and see by other means than its own books that nothing is lost.

    faults.py    goes into the processes under test: kills at a chosen commit, failing writes, a log of every row asked
    bench.py     one job with its store, its input and its runs       inline.py   a run in a forked process, without Ray
    driver.py    a run on a real Ray cluster                          tree.py     that cluster's processes, found by pid
    kinds.py     what is done to a job: one function per kind         verify.py   is every row there once, is every file whole
    events.py    what was asked twice, and what that cost             report.py   build/chaos.json and the table

`python -m tests.chaos --help` starts it; docs/chaos.md explains it.
"""
