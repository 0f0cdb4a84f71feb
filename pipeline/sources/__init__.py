"""Where weights come from: the Hub, a local folder, a package that carries a model."""
