"""`enginesmith new`: from a model's `config.json` to a recipe that loads and plans without faults.

origin     a Hub repository or a folder -> its config.json and the recipe's source
fitting    config.json -> model shape; shape and card -> the largest sizes that fit
text       all of it -> the YAML files
command    the three above in order; the files appear together or not at all
"""
