"""VICI: the protocol, charon's answers, and the agent's own control socket."""
