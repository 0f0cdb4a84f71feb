"""`enginesmith new`: from a model's `config.json` to a recipe that loads and plans without faults.

origin     a Hub repository or a folder -> its config.json and the recipe's source
fitting    model shape and card -> the largest sizes that fit
command    all of it -> the YAML files, which appear together or not at all
"""
