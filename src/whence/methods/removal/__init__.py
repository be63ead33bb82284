"""Values of images read from retrained models."""
