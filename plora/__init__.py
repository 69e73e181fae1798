"""plora: many LoRA configurations trained at once over one frozen base model."""
