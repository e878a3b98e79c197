"""What is kept of the loaded rows, and why: scores of texts, rules over scores, duplicates, diversity.

Everything here takes and returns plain values, Arrow batches and NumPy arrays, and touches no file, setting or logger.
"""
