"""What a precompute job would ask, why, and what it would cost: `precompute --dry-run`.

preview.py  the whole of it        compare.py   rows against existing answers          changes.py  what changed, in words
probe.py    some rows, answered    estimate.py  tokens, seconds, money                 terminal.py on the terminal
"""
