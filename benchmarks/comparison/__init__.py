"""What `python benchmarks/compare.py` is made of: the methods, the problems, three sides, and the report."""
