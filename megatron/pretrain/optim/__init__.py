"""How weights are updated: the optimizer, and the learning rate as a function of position."""
