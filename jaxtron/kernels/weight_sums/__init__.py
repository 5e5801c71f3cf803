"""Weight gradients added to their sums by the products that make them."""
