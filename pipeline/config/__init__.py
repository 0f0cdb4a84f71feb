"""From a recipe's name and overrides to checked, typed objects; Hydra ends here.

    folders    where recipes and options lie
    sweep      overrides -> one combination per job
    compose    one combination -> one resolved configuration
    construct  one configuration -> one object, or every fault in it
    load       the four above in order

Nothing here raises on a bad recipe: each step returns what it could do and the faults it found, so
that one run reports all of them.
"""
