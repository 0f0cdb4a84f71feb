"""From a recipe's name and overrides to a checked, typed `Recipe`; Hydra ends here.

    folders    where recipes and options lie
    compose    recipe and overrides -> one configuration, by Hydra; where each key was written
    validate   one configuration -> one `Recipe`, or every fault in it, by pydantic
    load       the above in order

Nothing here raises on a bad recipe: each step returns what it could do and the faults it found, so
that one run reports all of them.
"""
