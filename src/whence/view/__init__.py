"""The local viewer: a run folder in a browser, on this machine alone, read and never written. It needs no torch."""
