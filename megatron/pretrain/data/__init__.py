"""From JSON lines to token streams on disk, and from those to the batches of a run."""
