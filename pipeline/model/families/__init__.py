"""One file per family, named like `model_type` of config.json; `read` makes its ModelSpec.

A new architecture is one file here and one file in `recipes/shapes`. A family states its
`ARCHITECTURE` (what `architectures` must hold) and

    def read(keys: ConfigKeys) -> ModelSpec: ...

which reads every key that it understands. Keys that nothing read stop the build.
"""
