"""The hybrid model: a pattern's layers, and how Megatron builds them."""
