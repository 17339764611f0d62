"""A network of namespaces with real charons, and what is measured in it."""
