"""Other libraries' map estimators, and this package's, on pairs whose optimal map is known."""
