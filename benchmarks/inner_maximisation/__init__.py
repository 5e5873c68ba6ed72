"""How much of the maximum each solver of the inner maximisation finds, on networks that are made the same every time."""
