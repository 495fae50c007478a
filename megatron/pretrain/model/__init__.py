"""The model: which layers it is built from, how large it is and what it costs."""
