"""Methods, decoders, clipping rules and tasks that others write: loaded, held to the contract, begun from a template."""
