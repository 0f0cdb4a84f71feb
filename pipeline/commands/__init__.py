"""The commands of `enginesmith`: one function each, which imports what it needs when it runs."""
