"""`enginesmith new`: from a `config.json` to a recipe that loads and plans without faults."""
