"""Tasks and the models they are trained on: one file per family."""
