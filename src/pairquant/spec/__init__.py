"""What can be chosen and what is stored: options, recipes, plans, the checkpoint's entries and tensors."""
