"""Faster forms of the layers for a CPU: the same mathematics in other calls, behind one switch.

- `switch`: `vmamba.nn.fused(enabled)`, the switch.
- `entry`: the conditions under which a layer's fused form replaces it.
- `products`: products and convolutions by oneDNN or MKL, fused with activations and with less kept for
  backward.
- `blocking`: splits the work into images or rows, so that intermediates stay in the cache.
- `forms`: the fused form of each layer.
"""
