"""Speed of fusedskip beside eager and `torch.compile`: `make bench`, then `benchmarks.report`."""
