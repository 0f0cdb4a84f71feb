"""Checks that the compiler was handed the graph that we wrote.

No GPU is here to notice a wrong engine, and a parser may drop what it does not support without a
word: TensorRT-RTX 1.7.1 does so with `nonpad_kv_seqlen`. Hence two checks on the *parsed*
`INetworkDefinition`, the last thing before the compiler that can still be read:

- `guard`: every build, whole network, milliseconds: interface, attention layers, cache updates.
- `compare`: a cut of the model (embedding, two layers, final norm, lm_head), once per architecture,
  RTX version and graph code: a small interpreter computes what the parsed network says, ONNX
  Runtime computes the float32 graph.
"""
