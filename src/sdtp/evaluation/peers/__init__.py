"""What one would use instead of learned pruning, behind one interface: `with peer(model) as held: model.generate()`."""
