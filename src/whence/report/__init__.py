"""The page and the gallery that people look at."""
