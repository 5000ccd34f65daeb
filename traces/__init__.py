"""Traces: readers, a writer, generators, reshaping and statistics.

Importing this package is cheap: numpy is loaded by the generators that need it, when they run.
"""
