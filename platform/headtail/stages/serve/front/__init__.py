"""The front: processes that share the public port, map the snapshot, answer hits themselves and hand misses to the students."""
