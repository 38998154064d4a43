"""What leaves a run for others: weights without pickle, the field as a program, renders with cameras, a model card."""
