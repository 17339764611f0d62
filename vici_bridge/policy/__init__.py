"""What may move, what may come in, and under which names."""
