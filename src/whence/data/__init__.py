"""Images: where they lie, what is wrong with them, and their pixels."""
