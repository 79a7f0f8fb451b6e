"""Uscidda, Cuturi 2023, from samples to the page."""
