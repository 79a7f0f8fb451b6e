"""What the package costs (``speed``) and what comes of it (``science``), each ``python -m benchmarks.NAME``."""
