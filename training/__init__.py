"""Training and evaluation: everything that does not ship in the image."""
