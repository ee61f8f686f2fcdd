"""Releases: which snapshot and students are served, and how one takes another's place."""
