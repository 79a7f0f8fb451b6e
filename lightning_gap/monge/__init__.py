"""monge."""
