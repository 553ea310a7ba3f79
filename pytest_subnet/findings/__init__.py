"""Findings: one file each, with its measure, its result and its assertions."""
