"""The `fused` layers: faster than Transformer Engine on Hopper, from packages that pip installs."""
