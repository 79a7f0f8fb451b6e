"""Hoffer, Hubara, Soudry 2017, from training to the page."""
