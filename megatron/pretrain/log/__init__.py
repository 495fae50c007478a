"""What a run says of itself: figures of an interval of iterations, and the places they go to."""
