"""Algebra on LoRA factors in numpy: products, resizing, counting."""
