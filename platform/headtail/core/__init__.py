"""What everything else is made of: rows, tasks, keys, texts, scores, configs, errors, receipts. Knows no framework."""
