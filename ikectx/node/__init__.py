"""The mobile node's side of a handover, without I/O."""
