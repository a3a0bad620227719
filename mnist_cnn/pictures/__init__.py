"""Any picture of a digit in the form that networks are trained on."""
