"""Proof that an install and a run read nothing from the caches of the machine: what they opened outside their own folders."""
