"""Packed multi-adapter layers for any model whose linear layers are ``nn.Linear``."""
