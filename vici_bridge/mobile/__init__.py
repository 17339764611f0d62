"""A mobile node's side of a move: the handovers that it asks for, and the SPIs that a gateway asks for."""
