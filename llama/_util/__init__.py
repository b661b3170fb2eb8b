"""Helpers that know nothing of models: files, JSON lines, checks, the console."""
