"""The agent of a mobile node, and its commands."""
