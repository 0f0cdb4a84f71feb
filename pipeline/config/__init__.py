"""From a recipe's name and overrides to a checked, typed `Recipe`; Hydra ends here."""
