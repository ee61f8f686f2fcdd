"""The base of everything else: rows, tasks, keys, texts, scores, configs, errors, receipts. Knows no framework."""
