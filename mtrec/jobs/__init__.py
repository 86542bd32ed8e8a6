"""The only package that imports ray: train, score, compare, submit."""
