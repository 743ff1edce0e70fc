"""One file for each kind of benchmark; eval.py runs them."""
