"""What a CPU gains by doing the layers' mathematics in other calls, behind one switch.

- `switch`: `vmamba.nn.fused(enabled)`, the switch.
- `entry`: the conditions under which a layer's fused form stands in for it.
- `products`: products and convolutions by oneDNN or MKL, with activations joined to them and less kept for
  backward.
- `blocking`: work by some images or some rows at a time, so that intermediates stay in the cache.
- `forms`: the fused form of each layer.
"""
