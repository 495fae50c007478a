"""How a tokenizer is learnt: from the user's own text, or from the packages that a recipe names."""
