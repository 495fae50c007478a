"""What keeps a long run alive: stopping in order, and giving up when training has gone wrong."""
