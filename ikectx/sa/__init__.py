"""What an IKE_SA with its CHILD_SAs is: names, keys, addresses, and what a gateway thinks of it."""
