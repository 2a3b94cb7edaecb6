"""What takes how long: models, the operator, a recipe's data."""
