"""What the user can choose and what a checkpoint stores: options, recipes, plans, entries of config.json, tensors."""
