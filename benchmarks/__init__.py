"""Side by side with other ways to do the same: run as `python -m benchmarks.NAME`."""
