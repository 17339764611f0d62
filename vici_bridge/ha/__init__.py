"""charon's ha plugin: messages, what they tell of an SA, and how SAs are told to charon."""
